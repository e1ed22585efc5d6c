"""Groups: layers that take one scheme together, because engines compute or store them as one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

from llmopt.model.spec import ModelSpec
from llmopt.model.storage import stored_bytes
from llmopt.quantize.scheme import Scheme, parse_scheme

# Of the schemes for weights alone, those that no other one beats: a scheme per channel stores its scale once in 128
# weights, and so is no smaller than groups of 128; and zero points are of little use to 8 bits.
CANDIDATES: tuple[Scheme, ...] = tuple(
    map(
        parse_scheme,
        (
            "w4a16-g128-sym",
            "w4a16-g128-asym",
            "w4a16-g64-sym",
            "w4a16-g64-asym",
            "w4a16-g32-sym",
            "w4a16-g32-asym",
            "w8a16-g128-sym",
            "w8a16-g64-sym",
        ),
    )
)
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Group:
    """Layers by module name, the shape, [out, in], of each weight stored for them, and the schemes to choose from.

    Queries, keys and values are one group, and so are gate and up: engines multiply them at once. A tied head and its
    embedding are one table, stored once. A candidate of None is float32.
    """

    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    candidates: tuple[Scheme | None, ...]

    @property
    def name(self) -> str:
        """What its layers' names share, and how they differ: `model.layers.0.self_attn.q_proj+k_proj+v_proj`."""
        scope, dot, _ = self.layers[0].rpartition(".")
        first, *others = self.layers
        return "+".join([first, *(layer.removeprefix(scope + dot) for layer in others)])

    @property
    def weights(self) -> int:
        """How many there are."""
        return sum(map(prod, self.shapes))

    def stored_bytes(self, scheme: Scheme | None) -> int:
        """What they take on disk."""
        if scheme is None:
            return _FLOAT_BYTES * self.weights
        return sum(stored_bytes(rows, columns, scheme) for rows, columns in self.shapes)


def fused_groups(spec: ModelSpec, fixed: Mapping[str, Scheme | None]) -> tuple[Group, ...]:
    """Every layer in a group, the table first and the head last. Layers that are `fixed` have that scheme alone.

    Of a tied pair, what holds for the head holds for the embedding: both names are fixed, or none is.
    """
    embedding, head = spec.embedding, spec.head
    shapes = {linear.name: (linear.out_features, linear.in_features) for linear in spec.linears()}
    shapes[embedding.name] = (embedding.vocab_size, embedding.width)

    def choice(name: str) -> tuple[Scheme | None, ...]:
        return (fixed[name],) if name in fixed else CANDIDATES

    tables = (embedding.name, head.name) if spec.tied else (embedding.name,)
    found = [Group(tables, (shapes[embedding.name],), choice(embedding.name))]
    for fused in _fused(spec):
        for candidates, names in _by(choice, fused):
            found.append(Group(names, tuple(shapes[name] for name in names), candidates))
    return tuple(found)


def _fused(spec: ModelSpec) -> Iterator[tuple[str, ...]]:
    for block in spec.blocks:
        for linears in (block.attention.inputs, (block.attention.output,), block.mlp.inputs, (block.mlp.down,)):
            yield tuple(linear.name for linear in linears)
    if not spec.tied:
        yield (spec.head.name,)


def _by(
    choice: Callable[[str], tuple[Scheme | None, ...]], names: Sequence[str]
) -> Iterator[tuple[tuple[Scheme | None, ...], tuple[str, ...]]]:
    """Names that have the same choice, together."""
    in_order = sorted(names, key=lambda name: list(map(str, choice(name))))
    for candidates, alike in groupby(in_order, key=choice):
        yield candidates, tuple(alike)
