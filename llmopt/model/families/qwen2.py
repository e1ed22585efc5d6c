"""Qwen 1.5 to 2.5: Llama with biases on q, k and v."""

from llmopt.model.families import Config, Family
from llmopt.model.families._decoder import Identity, Style, llama_like
from llmopt.model.families._layer_types import qwen_windows
from llmopt.model.spec import ModelSpec

_IDENTITY = Identity(family="qwen2", architecture="Qwen2ForCausalLM", genai_type="qwen2")
_DEFAULTS = {
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
}


def _spec(config: Config) -> ModelSpec:
    config = {**_DEFAULTS, **config}
    return llama_like(config, _IDENTITY, Style(qkv_bias=True, windows=qwen_windows(config)))


FAMILY = Family(name="qwen2", model_types=("qwen2",), spec=_spec)
