"""Llama 1 to 3.3, and what is built like it: SmolLM2, TinyLlama, Yi."""

from llmopt.model.families import Config, Family
from llmopt.model.families._decoder import Identity, Style, llama_like
from llmopt.model.families._gguf import unpermute_rotary
from llmopt.model.spec import ModelSpec

_IDENTITY = Identity(family="llama", architecture="LlamaForCausalLM", genai_type="llama")
_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def _spec(config: Config) -> ModelSpec:
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    style = Style(qkv_bias=attention_bias, output_bias=attention_bias, mlp_bias=mlp_bias)
    return llama_like({**_DEFAULTS, **config}, _IDENTITY, style)


FAMILY = Family(name="llama", model_types=("llama",), spec=_spec, from_gguf=unpermute_rotary)
