"""Mistral 7B and its kin: Llama with a sliding window in every block."""

from llmopt.model.families import Config, Family
from llmopt.model.families._config import positive, require
from llmopt.model.families._decoder import Identity, Style, llama_like, window_of
from llmopt.model.families._gguf import unpermute_rotary
from llmopt.model.spec import ModelSpec

_IDENTITY = Identity(family="mistral", architecture="MistralForCausalLM", genai_type="mistral")
_DEFAULTS = {
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def _spec(config: Config) -> ModelSpec:
    config = {**_DEFAULTS, **config}
    require(config, "layer_types", None)  # transformers ignores them here, so nobody knows what such a model means
    windows = [window_of(config)] * positive(config, "num_hidden_layers")
    return llama_like(config, _IDENTITY, Style(windows=windows))


FAMILY = Family(name="mistral", model_types=("mistral",), spec=_spec, from_gguf=unpermute_rotary)
