"""How many bytes a model takes once it is quantized and exported, before any weight is read."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from llmopt.model.cost import norm_tensors
from llmopt.model.rotary import supported_length
from llmopt.model.spec import ModelSpec

_FLOAT32_BYTES, _FLOAT16_BYTES = 4, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizable:
    """Weights that have the same place in every block, and the same shape. `pattern` has * for the block's number.

    `tied` marks a head whose weight is the token table, which is stored, and listed, once.
    """

    pattern: str
    kind: Literal["embedding", "linear"]
    count: int
    out_features: int
    in_features: int
    tied: bool = False

    @property
    def parameters(self) -> int:
        """Weights stored for all of them together, biases left out."""
        return 0 if self.tied else self.count * self.out_features * self.in_features


class Grid(Protocol):
    """What a scheme says about storage; `llmopt.quantize.scheme.Scheme` is one."""

    @property
    def name(self) -> str:
        """As people write it."""
        ...

    @property
    def bits(self) -> int:
        """Bits a weight."""
        ...

    @property
    def activation_bits(self) -> int:
        """8 where whole rows are multiplied as integers."""
        ...

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale; None: a row."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether zero points are left out."""
        ...


def quantizable(spec: ModelSpec) -> tuple[Quantizable, ...]:
    """The token table and every linear, those with the same place and shape together, in the order of computation."""
    counts: dict[tuple[str, int, int, bool], int] = {}
    for linear in spec.linears():
        pattern = re.sub(r"\.\d+\.", ".*.", linear.name)
        key = (pattern, linear.out_features, linear.in_features, linear.tied_to is not None)
        counts[key] = counts.get(key, 0) + 1
    embedding = spec.embedding
    table = Quantizable(
        pattern=embedding.name,
        kind="embedding",
        count=1,
        out_features=embedding.vocab_size,
        in_features=embedding.width,
    )
    linears = (
        Quantizable(pattern=pattern, kind="linear", count=count, out_features=rows, in_features=columns, tied=tied)
        for (pattern, rows, columns, tied), count in counts.items()
    )
    return (table, *linears)


def quantized_bytes(spec: ModelSpec, grids: Mapping[str, Grid | None]) -> int:
    """Size of an exported model in bytes, with the token table and every linear, by its name, on a grid.

    None is float32. The graph's nodes and file headers are left out.
    """
    shapes = {spec.embedding.name: (spec.embedding.vocab_size, spec.embedding.width)}
    shapes |= {
        linear.name: (linear.out_features, linear.in_features) for linear in spec.linears() if linear.tied_to is None
    }
    weights = sum(_weight_bytes(rows, columns, grids[name]) for name, (rows, columns) in shapes.items())
    return weights + float_bytes(spec)


def float_bytes(spec: ModelSpec) -> int:
    """What is float32 under every scheme: norms, biases, learned positions, rotary tables, what is before the head."""
    biases = sum(linear.out_features for linear in spec.linears() if linear.bias)
    positions = spec.embedding.positions
    floats = biases + sum(tensor.count for tensor in norm_tensors(spec)) + rotary_values(spec)
    floats += sum(tensor.count for tensor in positions.tensors()) if positions is not None else 0
    floats += spec.before_head.weight.count if spec.before_head is not None else 0
    return floats * _FLOAT32_BYTES


def _weight_bytes(rows: int, columns: int, grid: Grid | None) -> int:
    return rows * columns * _FLOAT32_BYTES if grid is None else stored_bytes(rows, columns, grid)


def stored_bytes(rows: int, columns: int, grid: Grid) -> int:
    """One weight on `grid`: codes, a float16 scale a group, and a zero point a group where it is asymmetric.

    Weight-only kernels read whole groups, so a last one that is shorter is padded; and a scheme per channel repeats
    its scale for blocks of at most 128. Integer products have a float32 scale and the sum of each row.
    """
    if grid.activation_bits == 8:
        return rows * (columns + 2 * _FLOAT32_BYTES)
    size = grid.group_size or next((block for block in (128, 64, 32, 16) if columns % block == 0), 32)
    groups = math.ceil(columns / size)
    zero_points = 0 if grid.symmetric else math.ceil(groups * grid.bits / 8)
    return rows * (groups * size * grid.bits // 8 + groups * _FLOAT16_BYTES + zero_points)


def rotary_values(spec: ModelSpec) -> int:
    """A cosine and a sine for each pair of channels and position, in every table that blocks do not share."""
    rotaries = {block.attention.rotary for block in spec.blocks}
    return sum(supported_length(rotary, spec.context_length) * rotary.dim for rotary in rotaries if rotary is not None)
