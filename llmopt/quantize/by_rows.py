"""Weights rounded some rows at a time, which are independent: a vocabulary's table has no room for its temporaries."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

_AT_ONCE = 1 << 18  # values


def rounded(weight_OI: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Each weight to the nearest point of its group's grid."""
    parts = [weight for _, weight in _parts(weight_OI, scheme)]
    zeros = [part.zero_points_OG for part in parts if part.zero_points_OG is not None]
    return QuantizedWeight(
        scheme=parts[0].scheme,
        codes_OI=torch.cat([part.codes_OI for part in parts]),
        scales_OG=torch.cat([part.scales_OG for part in parts]),
        zero_points_OG=torch.cat(zeros) if zeros else None,
    )


def round_in_place(weight_OI: Tensor, scheme: Scheme) -> Tensor:
    """The weight, its values being those that their codes stand for."""
    for start, part in _parts(weight_OI, scheme):
        weight_OI[start : start + len(part.codes_OI)] = part.dequantize()
    return weight_OI


def _parts(weight_OI: Tensor, scheme: Scheme) -> Iterator[tuple[int, QuantizedWeight]]:
    at_once = max(1, _AT_ONCE // weight_OI.shape[1])
    for start in range(0, len(weight_OI), at_once):
        yield start, Rtn().quantize(weight_OI[start : start + at_once], scheme)
