"""The reference computation against transformers' own, for every family, on what `save_pretrained` writes."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from llmopt.engine import blocks
from llmopt.engine.torch import TorchEngine
from llmopt.errors import UnsupportedError, UsageError
from llmopt.model.families import spec_from_config
from llmopt.model.spec import Linear, ModelSpec, TensorSpec

TOKENS = 24
COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + index / 4 for index in range(6)],
    "long_factor": [9.0] * 6,
}
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 2000.0, "factor": 3.0},
}

CASES = {
    "llama": transformers.LlamaConfig(**COMMON, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
    "llama, tied, wide heads": transformers.LlamaConfig(
        **COMMON, tie_word_embeddings=True, head_dim=24, rope_parameters=YARN
    ),
    "mistral": transformers.MistralConfig(**COMMON, sliding_window=7),
    "mistral, whole context": transformers.MistralConfig(**COMMON, sliding_window=None, head_dim=32),
    "qwen2": transformers.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": transformers.Qwen3Config(**COMMON, head_dim=24, attention_bias=True, tie_word_embeddings=True),
    "phi3": transformers.Phi3Config(
        **COMMON, sliding_window=9, rope_parameters=LONGROPE, original_max_position_embeddings=32
    ),
    "phi3, plain": transformers.Phi3Config(**COMMON, tie_word_embeddings=True, hidden_act="gelu"),
    "gemma3": transformers.Gemma3TextConfig(
        **COMMON,
        head_dim=24,
        query_pre_attn_scalar=40,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=GEMMA_ROPE,
        attention_bias=True,
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=48, n_inner=80, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt2, exact gelu": transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=2, n_positions=32, activation_function="gelu"
    ),
    "opt": transformers.OPTConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=80,
        max_position_embeddings=40,
    ),
    "opt, no biases, untied": transformers.OPTConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=80,
        max_position_embeddings=32,
        enable_bias=False,
        tie_word_embeddings=False,
    ),
}


@dataclass(frozen=True)
class Saved:
    """Tensors as `save_pretrained` wrote them."""

    tensors: dict[str, Tensor]

    def read(self, tensor: TensorSpec) -> Tensor:
        stored = self.tensors[tensor.name]
        assert tuple(stored.shape) == tensor.shape
        return stored


@dataclass(frozen=True)
class Model:
    spec: ModelSpec
    saved: Saved
    ids_BT: np.ndarray
    expected_BTV: np.ndarray


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(CASES[request.param], tmp_path_factory.mktemp("model"))


def make_model(config: transformers.PreTrainedConfig, folder: Path) -> Model:
    """Random everywhere: norms are not one and biases are not zero."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for name, parameter in reference.named_parameters():
        one = 1.0 if "norm" in name or "ln_" in name else 0.0
        is_norm_weight = name.endswith("weight") and parameter.dim() == 1
        parameter.data = torch.randn_like(parameter) * (0.15 if parameter.dim() == 2 else 0.3) + one * is_norm_weight
    reference.save_pretrained(folder)
    ids_BT = torch.randint(0, config.vocab_size, (2, TOKENS))
    with torch.inference_mode():
        expected_BTV = reference(ids_BT).logits.numpy()
    spec = spec_from_config(json.loads((folder / "config.json").read_text()))
    return Model(spec, Saved(load_file(folder / "model.safetensors")), ids_BT.numpy(), expected_BTV)


def assert_same_logits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_spec_names_every_tensor_that_transformers_saves(model: Model) -> None:
    saved = {name: tuple(tensor.shape) for name, tensor in model.saved.tensors.items()}
    assert {tensor.name: tensor.shape for tensor in model.spec.tensors()} == saved


def test_logits_are_those_of_transformers(model: Model) -> None:
    assert_same_logits(TorchEngine(model.spec, model.saved).logits(model.ids_BT), model.expected_BTV)


def test_a_stream_gives_the_logits_of_the_whole_sequence(model: Model) -> None:
    ids_T = model.ids_BT[0]
    stream = TorchEngine(model.spec, model.saved).stream(capacity=TOKENS)
    prefilled = stream.feed(ids_T[:10])
    chunk = stream.feed(ids_T[10:14])
    decoded = [stream.feed(ids_T[position : position + 1]) for position in range(14, TOKENS)]
    expected_TV = model.expected_BTV[0, [9, 13, *range(14, TOKENS)]]
    assert_same_logits(np.stack([prefilled, chunk, *decoded]), expected_TV)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(CASES["llama"], tmp_path_factory.mktemp("llama"))


def test_streamed_weights_are_read_at_every_call_and_kept_ones_once(llama: Model) -> None:
    class Counting(Saved):
        reads: list[str]

        def read(self, tensor: TensorSpec) -> Tensor:
            self.reads.append(tensor.name)
            return super().read(tensor)

    names = sorted(tensor.name for tensor in llama.spec.tensors())
    for keep, calls in ((False, 2), (True, 1)):
        counting = Counting(llama.saved.tensors)
        object.__setattr__(counting, "reads", [])
        engine = TorchEngine(llama.spec, counting, keep=keep)
        first, second = engine.logits(llama.ids_BT), engine.logits(llama.ids_BT)
        assert sorted(counting.reads) == sorted(names * calls)
        np.testing.assert_array_equal(first, second)


def test_linears_are_applied_by_the_given_callable(llama: Model) -> None:
    applied: list[str] = []

    def noting(weights: blocks.Weights) -> blocks.Apply:
        def apply(linear: Linear, x: Tensor) -> Tensor:
            applied.append(linear.name)
            return blocks.plain(weights)(linear, x) * (0.0 if linear.name == "lm_head" else 1.0)

        return apply

    logits = TorchEngine(llama.spec, llama.saved, linears=noting).logits(llama.ids_BT)
    assert applied == [linear.name for linear in llama.spec.linears()]
    assert not logits.any()


def test_a_block_needs_its_norms_only_when_its_linears_are_applied_elsewhere(llama: Model) -> None:
    block = llama.spec.blocks[0]
    weights = {tensor.name: llama.saved.read(tensor) for tensor in block.tensors()}
    norms = {tensor.name: weights[tensor.name] for norm in block.norms() for tensor in norm.tensors()}
    turn = blocks.RotaryTables(llama.spec, 5).turn(block, 0, 5)
    hidden_BTH = torch.randn(1, 5, 64)
    expected = blocks.block_forward(block, weights, hidden_BTH, turn)
    torch.testing.assert_close(
        blocks.block_forward(block, norms, hidden_BTH, turn, apply=blocks.plain(weights)), expected
    )


def test_a_window_counts_the_token_itself() -> None:
    assert blocks.visible(tokens=2, seen=4, window=2).tolist() == [
        [False, True, True, False],
        [False, False, True, True],
    ]


def test_a_sequence_longer_than_the_context_is_refused(llama: Model) -> None:
    engine = TorchEngine(llama.spec, llama.saved)
    with pytest.raises(UnsupportedError, match="at most 64"):
        engine.logits(np.zeros((1, 65), np.int64))


def test_a_stream_refuses_tokens_beyond_its_capacity(llama: Model) -> None:
    stream = TorchEngine(llama.spec, llama.saved).stream(capacity=4)
    stream.feed(llama.ids_BT[0, :3])
    with pytest.raises(UsageError, match="4 tokens"):
        stream.feed(llama.ids_BT[0, :2])
