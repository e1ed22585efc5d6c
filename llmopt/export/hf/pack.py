"""Quantized weights as the tensors of compressed-tensors.

`pack-quantized` puts codes side by side into int32 words, the first in the lowest bits, and zero points likewise along
the rows. `int-quantized` has them as int8, around 0.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmopt.export.hf.tensor_file import Entry
from llmopt.quantize.pack import pack_nibbles
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

WORD_BITS = 32
PACKED = "pack-quantized"
INT8 = "int-quantized"


def format_of(scheme: Scheme) -> str:
    """What compressed-tensors calls the way in which such weights are stored."""
    return INT8 if scheme.activation_bits == 8 else PACKED


def entries(rows: int, columns: int, scheme: Scheme, dtype: torch.dtype) -> dict[str, Entry]:
    """The tensors of one weight, by what stands behind the linear's name; scales have the `dtype`."""
    groups = columns // (scheme.group_size or columns)
    scales = {"weight_scale": Entry(dtype, (rows, groups))}
    if format_of(scheme) == INT8:
        return {"weight": Entry(torch.int8, (rows, columns)), **scales}
    found = {
        "weight_packed": Entry(torch.int32, (rows, words(columns, scheme.bits))),
        "weight_shape": Entry(torch.int64, (2,)),
        **scales,
    }
    if not scheme.symmetric:
        found["weight_zero_point"] = Entry(torch.int32, (words(rows, scheme.bits), groups))
    return found


def tensors(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The values of `entries`. The scales are such as `dtype` holds without rounding."""
    scheme, codes = weight.scheme, weight.codes_OI
    scales = {"weight_scale": weight.scales_OG.to(dtype)}
    if format_of(scheme) == INT8:
        return {"weight": (codes.to(torch.int16) - 128).to(torch.int8), **scales}
    found = {"weight_packed": pack_words(codes, scheme.bits), "weight_shape": torch.tensor(codes.shape), **scales}
    if weight.zero_points_OG is not None:
        found["weight_zero_point"] = pack_words(weight.zero_points_OG.T, scheme.bits).T
    return found


def words(values: int, bits: int) -> int:
    """How many int32 hold so many values."""
    return -(-values * bits // WORD_BITS)


def pack_words(values_RC: Tensor, bits: int) -> Tensor:
    """Unsigned values of 4 or 8 bits as int32 [rows, words]; a last word that is not full ends in zeros."""
    rows, columns = values_RC.shape
    padding = words(columns, bits) * WORD_BITS // bits - columns
    values: NDArray[np.uint8] = np.pad(values_RC.numpy(), ((0, 0), (0, padding)))
    packed = pack_nibbles(values) if bits == 4 else values
    return torch.from_numpy(np.ascontiguousarray(packed).view("<i4").reshape(rows, -1))
