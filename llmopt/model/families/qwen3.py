"""Qwen 3, dense: Llama with a norm on each head of q and k."""

from llmopt.model.families import Config, Family
from llmopt.model.families._decoder import Identity, Style, llama_like
from llmopt.model.families._layer_types import qwen_windows
from llmopt.model.spec import ModelSpec

_IDENTITY = Identity(family="qwen3", architecture="Qwen3ForCausalLM", genai_type="qwen3")
_DEFAULTS = {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
}


def _spec(config: Config) -> ModelSpec:
    config = {**_DEFAULTS, **config}
    bias = bool(config.get("attention_bias"))
    style = Style(qkv_bias=bias, output_bias=bias, head_norms=True, windows=qwen_windows(config))
    return llama_like(config, _IDENTITY, style)


FAMILY = Family(name="qwen3", model_types=("qwen3",), spec=_spec)
