"""From configs as they lie on the Hub to descriptions, held against transformers and what is known of the models."""

import json
import pkgutil
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmopt.errors import ModelError, UnsupportedError
from llmopt.model import families
from llmopt.model.families import Family, spec_from_config
from llmopt.model.spec import ModelSpec

# The keys that count of published configs, as transformers 4 wrote them, and the models' parameters.
SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}
LLAMA_32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
}
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN25_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "use_mrope": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
PHI3_MINI_128K: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "longrope", "short_factor": [1.05] * 48, "long_factor": [1.5] * 48},
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
GEMMA3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "torch_dtype": "bfloat16",
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
OPT_125M: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "_remove_final_layer_norm": False,
    "vocab_size": 50272,
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "word_embed_proj_dim": 768,
    "torch_dtype": "float16",
}
PUBLISHED = {
    "SmolLM2-135M": (SMOLLM2_135M, 134_515_008),
    "Llama-3.2-1B": (LLAMA_32_1B, 1_235_814_400),
    "Mistral-7B-v0.1": (MISTRAL_7B, 7_241_732_096),
    "Qwen2.5-0.5B": (QWEN25_05B, 494_032_768),
    "Qwen3-0.6B": (QWEN3_06B, 596_049_920),
    "Phi-3-mini-128k": (PHI3_MINI_128K, 3_821_079_552),
    "gemma-3-1b": (GEMMA3_1B, 999_885_952),
    "gpt2": (GPT2, 124_439_808),
    "opt-125m": (OPT_125M, 125_239_296),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_describes_the_published_number_of_parameters(name: str) -> None:
    config, parameters = PUBLISHED[name]
    assert sum(tensor.count for tensor in spec_from_config(config).tensors()) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_have_the_names_and_shapes_that_transformers_gives_them(name: str) -> None:
    config, _ = PUBLISHED[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(understood(config))
    expected = {key: tuple(value.shape) for key, value in model.named_parameters()}  # without a tied head
    assert {tensor.name: tensor.shape for tensor in spec_from_config(config).tensors()} == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_means_the_same_when_transformers_5_writes_it_anew(name: str) -> None:
    config, _ = PUBLISHED[name]
    rewritten = json.loads(understood(config).to_json_string(use_diff=False))
    assert "rope_scaling" not in rewritten
    assert spec_from_config(rewritten) == spec_from_config(config)


def understood(config: dict[str, Any]) -> transformers.PreTrainedConfig:
    plain = {key: value for key, value in json.loads(json.dumps(config)).items() if key != "auto_map"}
    return transformers.CONFIG_MAPPING[config["model_type"]](**plain)


def test_every_family_is_held_against_a_published_model() -> None:
    assert {config["model_type"] for config, _ in PUBLISHED.values()} == set(families.families())


def test_every_family_is_one_file() -> None:
    files = {entry.name for entry in pkgutil.iter_modules(families.__path__) if not entry.name.startswith("_")}
    assert {family.name for family in families.families().values()} == files


def test_identity_and_tokens_come_from_the_config() -> None:
    spec = spec_from_config(LLAMA_32_1B)
    assert (spec.family, spec.architecture, spec.genai_type) == ("llama", "LlamaForCausalLM", "llama")
    assert (spec.dtype, spec.context_length) == ("bfloat16", 131072)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (128000, (128001, 128008, 128009), None)


def test_what_a_config_leaves_out_is_what_transformers_assumes() -> None:
    """Missing: rope_theta, dtype, bos, eos, heads of keys and values, tying."""
    sizes = {key: SMOLLM2_135M[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    spec = spec_from_config({"model_type": "llama", "num_attention_heads": 9, **sizes})
    attention = spec.blocks[0].attention
    assert (attention.kv_heads, attention.head_dim) == (9, 64)
    assert attention.rotary is not None
    assert attention.rotary.theta == 10000.0
    assert (spec.tied, spec.dtype, spec.bos_token_id, spec.eos_token_ids) == (False, "float32", 1, (2,))


def windows(spec: ModelSpec) -> list[int | None]:
    return [block.attention.window for block in spec.blocks]


def test_mistral_slides_in_every_block() -> None:
    assert windows(spec_from_config(MISTRAL_7B)) == [4096] * 32


def test_a_window_as_long_as_the_context_is_none() -> None:
    assert windows(spec_from_config(PHI3_MINI_128K)) == [None] * 32


def test_qwen_slides_only_when_asked_to_and_from_a_block_on() -> None:
    not_asked = QWEN25_05B | {"sliding_window": 64, "max_window_layers": 20}
    assert windows(spec_from_config(not_asked)) == [None] * 24
    assert windows(spec_from_config(not_asked | {"use_sliding_window": True})) == [None] * 20 + [64] * 4


def test_gemma_turns_blocks_with_a_window_faster_than_those_without() -> None:
    blocks = spec_from_config(GEMMA3_1B).blocks
    assert windows(spec_from_config(GEMMA3_1B))[:7] == [512] * 5 + [None, 512]
    thetas = [block.attention.rotary.theta for block in blocks if block.attention.rotary is not None]
    assert thetas[4:7] == [10000.0, 1000000.0, 10000.0]


def test_before_transformers_5_gemma_scaled_only_the_blocks_without_a_window() -> None:
    config = GEMMA3_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    rotaries = [block.attention.rotary for block in spec_from_config(config).blocks]
    assert [rotary.kind for rotary in rotaries[4:7] if rotary is not None] == ["default", "linear", "default"]


def test_phi_keeps_the_length_it_was_trained_on_beside_the_factors() -> None:
    rotary = spec_from_config(PHI3_MINI_128K).blocks[0].attention.rotary
    assert rotary is not None
    assert rotary.kind == "longrope"
    assert dict(rotary.scaling)["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize("early", ["su", "yarn"])
def test_early_phi_configs_have_other_words_for_longrope(early: str) -> None:
    config = PHI3_MINI_128K | {"rope_scaling": PHI3_MINI_128K["rope_scaling"] | {"type": early}}
    assert spec_from_config(config) == spec_from_config(PHI3_MINI_128K)


@pytest.mark.parametrize(
    ("config", "changes", "key"),
    [
        (SMOLLM2_135M, {"hidden_act": "mish"}, "hidden_act"),
        (SMOLLM2_135M, {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        (SMOLLM2_135M, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (SMOLLM2_135M, {"num_local_experts": 8}, "num_local_experts"),
        (SMOLLM2_135M, {"attention_multiplier": 0.5}, "attention_multiplier"),
        (QWEN25_05B, {"use_mrope": True}, "use_mrope"),
        (SMOLLM2_135M, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (SMOLLM2_135M, {"rope_scaling": {"rope_type": "proportional"}}, "rope_type"),
        (SMOLLM2_135M, {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        (MISTRAL_7B, {"attention_bias": True}, "attention_bias"),
        (MISTRAL_7B, {"layer_types": ["full_attention"] * 32}, "layer_types"),
        (QWEN25_05B, {"mlp_bias": True}, "mlp_bias"),
        (QWEN3_06B, {"layer_types": ["chunked_attention"] * 28}, "layer_types"),
        (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA3_1B, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (GEMMA3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (OPT_125M, {"do_layer_norm_before": False}, "do_layer_norm_before"),
        (OPT_125M, {"word_embed_proj_dim": 512}, "word_embed_proj_dim"),
        (OPT_125M, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        (OPT_125M, {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    ],
)
def test_what_a_spec_cannot_say_is_refused_by_name(config: dict[str, Any], changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UnsupportedError, match=key):
        spec_from_config(config | changes)


@pytest.mark.parametrize(
    ("config", "changes", "what"),
    [
        (SMOLLM2_135M, {"num_key_value_heads": 4}, "9 attention heads do not divide into 4 groups"),
        (SMOLLM2_135M, {"num_attention_heads": 0}, "num_attention_heads = 0"),
        (SMOLLM2_135M, {"num_attention_heads": 7, "num_key_value_heads": 7}, "7 attention heads"),
        (SMOLLM2_135M, {"hidden_size": "576"}, "hidden_size = '576'"),
        (SMOLLM2_135M, {"rope_scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
        (SMOLLM2_135M, {"head_dim": 63}, "63 channels"),
        (QWEN3_06B, {"layer_types": ["full_attention"]}, "1 layer_types for 28 layers"),
        (QWEN3_06B, {"layer_types": ["sliding_attention"] * 28}, "sliding_window is missing"),
        (GEMMA3_1B, {"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(
    config: dict[str, Any], changes: dict[str, Any], what: str
) -> None:
    with pytest.raises(ModelError, match=what) as caught:
        spec_from_config(config | changes, where="folder/config.json")
    assert caught.value.where == "folder/config.json"


def test_a_missing_key_is_named() -> None:
    config = {key: value for key, value in SMOLLM2_135M.items() if key != "hidden_size"}
    with pytest.raises(ModelError, match="lacks 'hidden_size'"):
        spec_from_config(config)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**9), ("vocab_size", 2**63)])
def test_a_number_that_no_model_has_is_refused_at_once(key: str, value: int) -> None:
    with pytest.raises(ModelError, match=f"{key} = {value}"):
        spec_from_config(SMOLLM2_135M | {key: value})


def test_an_unknown_family_is_told_the_nearest_and_the_known_ones() -> None:
    with pytest.raises(UnsupportedError) as far:
        spec_from_config({"model_type": "mamba"})
    assert far.value.hint is not None
    assert far.value.hint.startswith("known here: gemma3")
    with pytest.raises(UnsupportedError, match=r"did you mean 'qwen2'\? known here: gemma3"):
        spec_from_config({"model_type": "qwen22"})


def family(model_type: str) -> Family:
    return families.families()[model_type]


def converted_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own permutation of q and k, as its converter writes it."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(("name", "heads"), [("q_proj", 4), ("k_proj", 2)])
@pytest.mark.parametrize("suffix", ["weight", "bias"])
def test_llama_rows_come_back_in_order_from_gguf(name: str, heads: int, suffix: str) -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    weight = np.arange(heads * 6 * 3).reshape(heads * 6, 3) if suffix == "weight" else np.arange(heads * 6)
    stored = converted_rows(weight, heads)
    assert not np.array_equal(stored, weight)
    restored = family("llama").from_gguf(f"model.layers.0.self_attn.{name}.{suffix}", stored, config)
    np.testing.assert_array_equal(restored, weight)


def test_other_tensors_of_llama_are_as_gguf_has_them() -> None:
    weight = np.arange(12).reshape(4, 3)
    restored = family("llama").from_gguf("model.layers.0.self_attn.v_proj.weight", weight, {"num_attention_heads": 2})
    assert restored is weight


def test_gemma_norms_lose_the_one_that_gguf_adds() -> None:
    undo = family("gemma3_text").from_gguf
    np.testing.assert_array_equal(undo("model.layers.0.self_attn.q_norm.weight", np.array([1.5, 0.0]), {}), [0.5, -1.0])
    np.testing.assert_array_equal(undo("model.layers.0.mlp.up_proj.weight", np.ones((1, 2)), {}), [[1.0, 1.0]])


def test_gpt2_linears_are_turned_back() -> None:
    undo = family("gpt2").from_gguf
    assert undo("transformer.h.0.attn.c_attn.weight", np.zeros((9, 3)), {}).shape == (3, 9)
    assert undo("transformer.wte.weight", np.zeros((9, 3)), {}).shape == (9, 3)
