"""Rotary embedding as configs describe it.

transformers 5 writes everything into `rope_parameters`; before, `rope_theta` stood in the config and the rest in
`rope_scaling`, whose `type` later became `rope_type`.
"""

from collections.abc import Mapping
from typing import Any

from llmopt.errors import UnsupportedError
from llmopt.model.families import Config
from llmopt.model.rotary import REQUIRED
from llmopt.model.spec import Rotary

_DEFAULT_THETA = 10_000.0
_OPTIONAL = frozenset(
    {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings",
     "truncate"}
)  # fmt: skip
_KNOWN = frozenset(key for keys in REQUIRED.values() for key in keys) | _OPTIONAL
_NOT_SCALING = frozenset({"rope_theta", "partial_rotary_factor", "type", "rope_type"})
_HAS_ORIGINAL_LENGTH = frozenset({"llama3", "yarn", "longrope"})


def rotary(config: Config, head_dim: int, *, partial: bool = False) -> Rotary:
    """The one rotary embedding of a model; `partial` says whether the family can rotate a part of each head only.

    Raises:
        KeyError: the kind of scaling needs a key that is missing.
        UnsupportedError: an unknown kind or key, or a partial rotation where the family has none.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = given.get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA
    factor = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if factor != 1.0 and not partial:
        raise UnsupportedError(f"partial_rotary_factor = {factor!r} is not supported in this family")
    dim = int(head_dim * factor)
    if dim % 2:
        raise ValueError(f"{dim} channels of each head cannot be rotated in pairs")
    return Rotary(dim=dim, theta=float(theta), scaling=scaling(config, given))


def scaling(config: Config, given: Mapping[str, Any]) -> tuple[tuple[str, object], ...]:
    """The kind of a rotary embedding and its numbers, as sorted pairs; empty for the plain kind.

    Raises:
        KeyError: the kind needs a key that is missing.
        UnsupportedError: the kind or one of its keys is unknown.
    """
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in REQUIRED:
        raise UnsupportedError(f"rope_type = {kind!r} is not supported", hint=f"known: {', '.join(REQUIRED)}")
    numbers = {key: value for key, value in given.items() if key not in _NOT_SCALING and value is not None}
    unknown = sorted(numbers.keys() - _KNOWN)
    if unknown:
        raise UnsupportedError(f"the rope parameter {unknown[0]!r} is not supported")
    if kind == "default":
        return ()
    if kind in _HAS_ORIGINAL_LENGTH:
        numbers["original_max_position_embeddings"] = _original_length(config, numbers)
    described = {key: tuple(value) if isinstance(value, list) else value for key, value in numbers.items()}
    for key in REQUIRED[kind]:
        described[key]  # a KeyError here names what the config lacks
    return tuple(sorted({"rope_type": kind, **described}.items()))


def _original_length(config: Config, numbers: Mapping[str, Any]) -> Any:
    # transformers lets the config's own key win over the one beside the factors: Phi-3 writes it there.
    beside = numbers.get("original_max_position_embeddings")
    return config.get("original_max_position_embeddings") or beside or config["max_position_embeddings"]
