"""The kernels that a weight-only product can have.

All of them read the weight as its scheme says and keep it as small on the disk. They differ in how activations are
multiplied, and in the blocks that a scale per channel is repeated for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from llmopt.quantize.pack import channel_block
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

# MatMulNBits: 4 rounds activations to int8, block by block; 0 multiplies float32, and at 8 bits unpacks the whole
# weight for it in every call.
INT8, FLOAT32 = 4, 0
LARGEST_BLOCK = 256
# There are int8 kernels for 2 bits in blocks of these sizes alone; else level 4 multiplies float32 after all.
INT8_BLOCKS_OF_2_BITS = (32, 64, 128)
# A larger weight is timed by its first rows: the kernel divides rows among threads, and 16 MB are more than a cache.
TIMED_WEIGHTS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A product whose kernel is to be chosen: for every token of a prompt, or as the head for the last one alone."""

    scheme: Scheme
    rows: int
    columns: int
    every_token: bool = True

    @classmethod
    def of(cls, weight: QuantizedWeight, *, every_token: bool) -> "Shape":
        """That of a weight [rows, columns]."""
        rows, columns = weight.codes_OI.shape
        return cls(scheme=weight.scheme, rows=rows, columns=columns, every_token=every_token)

    @property
    def name(self) -> str:
        """As caches and reports call it."""
        return f"{self.scheme.name}, {self.columns} to {self.rows}{'' if self.every_token else ', the last token only'}"

    def timed(self) -> "Shape":
        """As much of it as is timed."""
        return replace(self, rows=min(self.rows, max(1, TIMED_WEIGHTS // self.columns)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """MatMulNBits with one choice of its attributes."""

    block_size: int
    accuracy_level: int

    @property
    def name(self) -> str:
        """As caches and reports call it."""
        return f"blocks of {self.block_size}, {'int8' if self.accuracy_level == INT8 else 'float32'} activations"


Choose = Callable[[Shape], Kernel]


def default_kernel(shape: Shape) -> Kernel:
    """What is right on most machines: int8 activations, several times faster in decoding than float32."""
    block_size = shape.scheme.group_size or channel_block(shape.columns)
    return Kernel(block_size=block_size, accuracy_level=INT8 if _has_int8(shape.scheme, block_size) else FLOAT32)


def candidates(shape: Shape) -> tuple[Kernel, ...]:
    """The kernels of a shape, the default first. Blocks smaller than its own would take more bytes for scales."""
    default = default_kernel(shape)
    sizes = [default.block_size]
    if shape.scheme.group_size is None and shape.columns % LARGEST_BLOCK == 0:
        sizes.append(LARGEST_BLOCK)
    kinds = ((level, size) for level in (INT8, FLOAT32) for size in sizes)
    return tuple(
        Kernel(block_size=size, accuracy_level=level)
        for level, size in kinds
        if level == FLOAT32 or _has_int8(shape.scheme, size)
    )


def _has_int8(scheme: Scheme, block_size: int) -> bool:
    return scheme.bits != 2 or block_size in INT8_BLOCKS_OF_2_BITS
