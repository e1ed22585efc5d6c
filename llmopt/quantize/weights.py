"""A quantized weight: integer codes, the scales and zero points of their groups, and what they stand for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.quantize.scheme import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """codes_OI uint8 in [0, 2**bits), scales_OG float32, zero_points_OG uint8; w = (code - zero point) * scale.

    Groups run along the input channels; the last one may be shorter. A symmetric scheme's zero point is
    2**(bits - 1) everywhere, and `zero_points_OG` is None. Scales of a symmetric scheme may be negative: the codes
    reach one step further down than up, and the sign lets the larger tail use that step.
    """

    scheme: Scheme
    codes_OI: Tensor
    scales_OG: Tensor
    zero_points_OG: Tensor | None

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, [out, in] float32."""
        columns = self.codes_OI.shape[1]
        size = self.scheme.group_size or columns
        zeros = (
            2 ** (self.scheme.bits - 1) if self.zero_points_OG is None else spread(self.zero_points_OG, size, columns)
        )
        return (self.codes_OI.float() - zeros) * spread(self.scales_OG, size, columns)

    def relative_error(self, weight_OI: Tensor) -> float:
        """‖W - Ŵ‖ / ‖W‖ in the Frobenius norm; 0 for a weight of zeros that is kept exactly."""
        error = torch.linalg.vector_norm(weight_OI - self.dequantize(), dtype=torch.float64)
        norm = torch.linalg.vector_norm(weight_OI, dtype=torch.float64)
        return float(error / norm) if norm > 0 else float(error)


def spread(values_OG: Tensor, group_size: int, columns: int) -> Tensor:
    """Repeat each group's value over its columns, [out, columns]."""
    return values_OG.float().repeat_interleave(group_size, dim=1)[:, :columns]


def split_rows(whole: QuantizedWeight, sizes: list[int]) -> list[QuantizedWeight]:
    """What `stack_rows` put together, apart again: parts with so many rows each."""
    codes, scales = torch.split(whole.codes_OI, sizes), torch.split(whole.scales_OG, sizes)
    zeros = [None] * len(sizes) if whole.zero_points_OG is None else torch.split(whole.zero_points_OG, sizes)
    return [
        QuantizedWeight(scheme=whole.scheme, codes_OI=codes_OI, scales_OG=scales_OG, zero_points_OG=zeros_OG)
        for codes_OI, scales_OG, zeros_OG in zip(codes, scales, zeros, strict=True)
    ]


def stack_rows(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """The weights above one another, as one: chunks of a table, or linears that share their input.

    All parts have the same scheme and the same number of columns.
    """
    first = parts[0]
    assert all(part.scheme == first.scheme for part in parts)
    zero_points = [part.zero_points_OG for part in parts if part.zero_points_OG is not None]
    return QuantizedWeight(
        scheme=first.scheme,
        codes_OI=torch.cat([part.codes_OI for part in parts]),
        scales_OG=torch.cat([part.scales_OG for part in parts]),
        zero_points_OG=torch.cat(zero_points) if zero_points else None,
    )
