"""Rotary position embedding as tables of cosines and sines, for every kind of scaling that configs name.

Each kind says how fast every pair of channels turns (radians per token, `[dim / 2]`) and by how much the tables are
scaled. The formulas are those of transformers' `modeling_rope_utils`, computed in float64.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmopt.model.spec import ModelSpec, Rotary

Frequencies = NDArray[np.float64]

# The kinds that exist here, each with the numbers that its config must give.
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


def tables(rotary: Rotary, length: int, context_length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines for the first `length` positions, [length, dim / 2] each.

    Channel i of a head turns with channel i + dim / 2. `context_length` is the model's, whatever `length` is.
    `length` is at most `supported_length`; more is a mistake of the caller.
    """
    assert length <= supported_length(rotary, context_length), (length, rotary.kind)
    angles_TR = np.outer(np.arange(length, dtype=np.float64), frequencies(rotary))
    scale = attention_factor(rotary, context_length)
    return (np.cos(angles_TR) * scale).astype(np.float32), (np.sin(angles_TR) * scale).astype(np.float32)


def supported_length(rotary: Rotary | None, context_length: int) -> int:
    """How many tokens one table serves.

    Beyond its original length a longrope model turns at other speeds, from the first token on, so a sequence that
    grows past it would need its cache computed anew; a dynamic one changes with every token past the context.
    """
    if rotary is None or rotary.kind != "longrope":
        return context_length
    return min(context_length, int(_scaling(rotary)["original_max_position_embeddings"]))


def longest_sequence(spec: ModelSpec) -> int:
    """How many tokens the model reads at most: its context, or what the tables of all its blocks serve."""
    return min(supported_length(block.attention.rotary, spec.context_length) for block in spec.blocks)


def frequencies(rotary: Rotary) -> Frequencies:
    """Radians per token for every pair of channels, [dim / 2]."""
    plain = rotary.theta ** (-np.arange(0, rotary.dim, 2, dtype=np.float64) / rotary.dim)
    scaling = _scaling(rotary)
    match rotary.kind:
        case "default" | "dynamic":  # dynamic scaling sets in beyond the context length, which we never exceed
            return plain
        case "linear":
            return plain / float(scaling["factor"])
        case "llama3":
            return _llama3(plain, scaling)
        case "yarn":
            return _yarn(plain, scaling, rotary)
        case "longrope":
            return plain / np.asarray(scaling["short_factor"], dtype=np.float64)
    raise AssertionError(f"a spec with rope type {rotary.kind!r}")


def attention_factor(rotary: Rotary, context_length: int) -> float:
    """What cosines and sines are multiplied by: 1 but for yarn and longrope, which sharpen attention in long texts."""
    scaling = _scaling(rotary)
    given = scaling.get("attention_factor")
    if rotary.kind not in {"yarn", "longrope"}:
        return 1.0
    if given is not None:
        return float(given)
    if rotary.kind == "yarn":
        return _yarn_attention_factor(scaling)
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or context_length / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _scaling(rotary: Rotary) -> dict[str, Any]:
    return dict(rotary.scaling)


def _llama3(plain: Frequencies, scaling: Mapping[str, Any]) -> Frequencies:
    """Slow pairs turn slower by `factor`, fast ones stay, those between are blended (Llama 3.1)."""
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = int(scaling["original_max_position_embeddings"]) * plain / (2 * math.pi)  # within the original context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (kept + (1 - kept) / float(scaling["factor"]))


def _yarn(plain: Frequencies, scaling: Mapping[str, Any], rotary: Rotary) -> Frequencies:
    """The same idea with the blend linear over channels: "NTK-by-parts", arXiv 2309.00071, section 3.2."""
    original = int(scaling["original_max_position_embeddings"])

    def channel(turns: float) -> float:
        """Where a pair turns this often within the original context."""
        return rotary.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = channel(scaling.get("beta_fast") or 32), channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    width = high - low or 0.001  # as transformers does, so that the ramp stays finite
    slowed: Frequencies = np.clip((np.arange(rotary.dim // 2) - low) / width, 0.0, 1.0)
    return plain * (1 - slowed + slowed / float(scaling["factor"]))


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """0.1 ln(factor) + 1 (section 3.4), or the ratio of two such terms where the config weighs them (DeepSeek)."""
    factor, above, below = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")

    def term(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    return term(above) / term(below) if above and below else term(1.0)
