"""Over how many devices a model can be split inside its blocks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmopt.model.spec import ModelSpec

# Degrees that people ask about, as devices in one machine go.
COMMON_DEGREES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallel:
    """Whether a model can be split over `degree` devices inside every block; `obstacle` says why not."""

    degree: int
    obstacle: str | None

    @property
    def legal(self) -> bool:
        """Whether nothing is in the way."""
        return self.obstacle is None


def tensor_parallel(spec: ModelSpec, degree: int) -> TensorParallel:
    """Whether attention splits by whole heads and the MLP by whole channels (Megatron-LM, arXiv 1909.08053).

    Key-value heads are not copied to several devices: the degree divides them too.
    """
    for name, size in _split_sizes(spec).items():
        if size % degree:
            return TensorParallel(degree=degree, obstacle=f"{size} {name} do not divide by {degree}")
    return TensorParallel(degree=degree, obstacle=None)


def tensor_parallel_degrees(spec: ModelSpec) -> tuple[TensorParallel, ...]:
    """Every legal degree, and the obstacle to each other one that people ask about."""
    largest = math.gcd(*_split_sizes(spec).values())
    degrees = {degree for degree in range(1, largest + 1) if largest % degree == 0} | set(COMMON_DEGREES)
    return tuple(tensor_parallel(spec, degree) for degree in sorted(degrees))


def _split_sizes(spec: ModelSpec) -> Mapping[str, int]:
    """What a tensor-parallel degree must divide; blocks that differ count with what they have in common."""
    return {
        "attention heads": math.gcd(*(block.attention.heads for block in spec.blocks)),
        "key-value heads": math.gcd(*(block.attention.kv_heads for block in spec.blocks)),
        "MLP channels": math.gcd(*(block.mlp.size for block in spec.blocks)),
    }
