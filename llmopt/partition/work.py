"""Seconds that a device takes for the parts of a block: products, attention, and all that passes between them.

A product of one token reads its weights. One of several first puts them in order, multiplies, and lets what goes in and
comes out pass; where nothing is known of these, it takes what is longer, its operations or the reading of its weights
(the roofline, Williams et al. 2009). Everything else moves values: how many is counted here, as reads and writes.
"""

from dataclasses import dataclass

from llmopt.model.spec import Block, Linear
from llmopt.partition.device import DeviceClass, Speed

_GIGA, _TERA, _MICRO, _NANO = 1e9, 1e12, 1e-6, 1e-9
MASK_BYTES = 24  # of a token and one that it may see: their distance, the comparison, a float

# Reads and writes of a value: a norm squares, averages, scales and weighs; a rotation takes four products of halves,
# two sums and a concatenation; queries, keys and values are concatenated and cut; an MLP's inputs too, then activated.
_NORM, _SUM, _TURN, _JOIN, _ACTIVATE = 7, 3, 9, 2, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One rank's share of a product: a weight [rows, columns] of so many bytes, and tokens of `value_bytes` a value."""

    rows: float
    columns: float
    weight_bytes: float
    tokens: int
    value_bytes: int

    @property
    def flops(self) -> float:
        """A multiply and an add a weight and token."""
        return 2 * self.tokens * self.rows * self.columns

    @property
    def passing_bytes(self) -> float:
        """What goes in and comes out."""
        return self.tokens * (self.rows + self.columns) * self.value_bytes


def share_of(linear: Linear, weight_bytes: float, degree: int, *, writes: bool) -> tuple[float, float, float]:
    """Rows, columns and bytes that one of `degree` ranks has of a linear; what writes is cut by its inputs."""
    rows, columns = float(linear.out_features), float(linear.in_features)
    return (
        (rows, columns / degree, weight_bytes / degree) if writes else (rows / degree, columns, weight_bytes / degree)
    )


def product_s(product: Product, speed: Speed) -> float:
    """Seconds of a product."""
    return speed.factor(product.tokens, product.columns, product.weight_bytes) * _said_s(product, speed)


def _said_s(product: Product, speed: Speed) -> float:
    reading_s = product.weight_bytes / speed.bytes_per_s + product.rows * speed.row_ns * _NANO
    computing_s = product.flops / speed.flops
    call_s = speed.call_us * _MICRO
    if product.tokens == 1 or speed.packing_gb_per_s is None:
        return call_s + max(computing_s, reading_s)
    packing_s = product.weight_bytes / (speed.packing_gb_per_s * _GIGA)
    return call_s + packing_s + computing_s + passing_s(product.passing_bytes, speed.passing_gb_per_s)


def attention_s(flops: float, read_bytes: float, device: DeviceClass, speed: Speed) -> float:
    """Seconds of two products with the cache, which is read once; `speed` is that of the dtype."""
    known = device.attention
    flops_per_s = speed.flops if known is None else known.tflops * _TERA
    bytes_per_s = speed.bytes_per_s if known is None else known.gb_per_s * _GIGA
    return max(flops / flops_per_s, read_bytes / bytes_per_s)


def passing_s(size_bytes: float, gb_per_s: float | None) -> float:
    """Seconds of values that are read and written; nothing where it is not known."""
    return 0.0 if gb_per_s is None else size_bytes / (gb_per_s * _GIGA)


def passing_bytes(block: Block, tokens: int, pairs: float, value_bytes: int, degree: int = 1) -> float:
    """What passes through a block beside products and attention, for `tokens` of which `pairs` are compared in all."""
    attention, mlp = block.attention, block.mlp
    hidden = attention.output.out_features
    norms = sum(1 for norm in block.norms() if norm.size == hidden)
    turned = attention.q_size + attention.kv_size
    mixed = attention.q_size + 2 * attention.kv_size
    inner = sum(one.out_features for one in mlp.inputs)
    whole = hidden * (_NORM * norms + 2 * _SUM)
    shared = _TURN * turned * (attention.rotary is not None) + 2 * _JOIN * mixed + (_JOIN + _ACTIVATE / 2) * inner
    return tokens * (whole + shared / degree) * value_bytes + pairs * MASK_BYTES


def activation_bytes(block: Block, tokens: int, pairs: float, value_bytes: int, degree: int = 1) -> float:
    """What is there at once at the widest place of a block: its input thrice, what products give, and that side by side
    or multiplied; the mask.
    """
    widest = max(sum(one.out_features for one in branch) for branch in (block.attention.inputs, block.mlp.inputs))
    return tokens * (3 * block.attention.output.out_features + 2 * widest / degree) * value_bytes + pairs * MASK_BYTES
