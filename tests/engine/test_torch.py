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
from tests.families import CASES, Saved

TOKENS = 24


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
