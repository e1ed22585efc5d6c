"""Phi-3 to Phi-4-mini: Llama with q, k, v in one linear, gate and up in another, and longrope for long texts."""

from llmopt.model.families import Config, Family
from llmopt.model.families._config import positive
from llmopt.model.families._decoder import Identity, Style, llama_like, window_of
from llmopt.model.spec import ModelSpec

_IDENTITY = Identity(family="phi3", architecture="Phi3ForCausalLM", genai_type="phi3")
_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
    "tie_word_embeddings": False,
}


def _spec(config: Config) -> ModelSpec:
    config = {**_DEFAULTS, **config, "rope_scaling": _rope_scaling(config)}
    windows = [window_of(config)] * positive(config, "num_hidden_layers")
    return llama_like(config, _IDENTITY, Style(fused=True, partial_rotary=True, windows=windows))


def _rope_scaling(config: Config) -> Config:
    """Longrope was called "su" first; and what early Phi-3 configs call "yarn" is longrope too."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = given.get("rope_type") or given.get("type")
    return {**given, "rope_type": "longrope"} if kind in {"su", "yarn"} else given


FAMILY = Family(name="phi3", model_types=("phi3",), spec=_spec)
