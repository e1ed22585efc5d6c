"""Codes as the bytes that kernels read.

MatMulNBits and GatherBlockQuantized take the same bytes: each row cut into blocks, two 4-bit or four 2-bit codes in a
byte, the first in the lowest bits. A row that does not fill its last block is padded with the zero point, that is 0.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmopt.quantize.weights import QuantizedWeight

Bytes = NDArray[np.uint8]

# The kernels take blocks of 16 to 256; a scheme per channel uses the largest of these that cuts its rows evenly, since
# int8 activations are scaled per block as well, and smaller blocks follow them better.
CHANNEL_BLOCKS = (128, 64, 32, 16)


def block_size(weight: QuantizedWeight) -> int:
    """The kernel's block for this weight: its group, or for a whole row a size that divides it."""
    return weight.scheme.group_size or channel_block(weight.codes_OI.shape[1])


def channel_block(columns: int) -> int:
    """The block that a scale per channel is repeated for, unless another is asked for."""
    return next((size for size in CHANNEL_BLOCKS if columns % size == 0), 32)


def pack_bytes(values_RC: Bytes, bits: int) -> Bytes:
    """Values of 2, 4 or 8 bits, as many a byte as it holds, the first in the lowest bits; the last is padded with 0."""
    in_a_byte = 8 // bits
    values_RC = np.pad(values_RC, ((0, 0), (0, -values_RC.shape[1] % in_a_byte)))
    packed: Bytes = values_RC[:, 0::in_a_byte].copy()
    for place in range(1, in_a_byte):
        packed |= values_RC[:, place::in_a_byte] << np.uint8(place * bits)
    return packed


def unpack_bytes(packed_RC: Bytes, bits: int, columns: int) -> Bytes:
    """The inverse of `pack_bytes`."""
    values = np.stack([packed_RC >> shift & (2**bits - 1) for shift in range(0, 8, bits)], axis=-1)
    return values.reshape(len(packed_RC), -1)[:, :columns]


def pack_words(values_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """Values of 2, 4 or 8 bits as int32 [rows, words], the first in the lowest bits; the last word is padded with 0.

    So compressed-tensors and GPTQ checkpoints hold them.
    """
    packed = pack_bytes(values_RC.numpy(), bits)
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(np.ascontiguousarray(padded).view("<i4"))


def pack_codes(weight: QuantizedWeight, size: int | None = None) -> Bytes:
    """Codes as uint8 [out, blocks, block * bits / 8], in blocks of `size` instead of `block_size`."""
    size, (rows, columns) = size or block_size(weight), weight.codes_OI.shape
    blocks = -(-columns // size)
    codes = weight.codes_OI.numpy()
    if blocks * size > columns:
        # Each padded code is the zero point of the group that it falls into.
        zeros = zero_points(weight)[:, -1:]
        codes = np.concatenate([codes, np.repeat(zeros, blocks * size - columns, axis=1)], axis=1)
    return pack_bytes(codes, weight.scheme.bits).reshape(rows, blocks, -1)


def block_scales(weight: QuantizedWeight, size: int | None = None) -> NDArray[np.float32]:
    """One scale a block, float32 [out, blocks]; a scheme per channel repeats its own."""
    return _per_block(weight, weight.scales_OG.numpy(), size)


def block_zero_points(weight: QuantizedWeight, size: int | None = None) -> Bytes | None:
    """One zero point a block, packed like the codes; None where the kernel's own default, 2**(bits - 1), is meant."""
    if weight.zero_points_OG is None:
        return None
    return pack_bytes(_per_block(weight, zero_points(weight), size), weight.scheme.bits)


def zero_points(weight: QuantizedWeight) -> Bytes:
    """The zero points as they are meant, [out, groups]."""
    if weight.zero_points_OG is None:
        return np.full(weight.scales_OG.shape, 2 ** (weight.scheme.bits - 1), np.uint8)
    return weight.zero_points_OG.numpy()


def _per_block(weight: QuantizedWeight, values_OG: NDArray[Any], size: int | None) -> NDArray[Any]:
    if weight.scheme.group_size is not None:
        return values_OG
    blocks = -(-weight.codes_OI.shape[1] // (size or block_size(weight)))
    return np.repeat(values_OG, blocks, axis=1)
