"""Weights rounded some rows at a time, which are independent: a vocabulary's table has no room for its temporaries."""

from collections.abc import Iterator

from torch import Tensor

from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

_AT_ONCE = 1 << 17  # values


def rounded(weight_OI: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Each weight to the nearest point of its group's grid."""
    found: QuantizedWeight | None = None
    for start, part in _parts(weight_OI, scheme):
        if found is None:
            # Made once, and not put together from parts: memory between parts that are kept is lost to temporaries.
            zeros = part.zero_points_OG
            found = QuantizedWeight(
                scheme=part.scheme,
                codes_OI=_whole(part.codes_OI, weight_OI),
                scales_OG=_whole(part.scales_OG, weight_OI),
                zero_points_OG=None if zeros is None else _whole(zeros, weight_OI),
            )
        rows = slice(start, start + len(part.codes_OI))
        found.codes_OI[rows], found.scales_OG[rows] = part.codes_OI, part.scales_OG
        if found.zero_points_OG is not None and part.zero_points_OG is not None:
            found.zero_points_OG[rows] = part.zero_points_OG
    assert found is not None, "a weight has rows"
    return found


def _whole(part: Tensor, weight_OI: Tensor) -> Tensor:
    """Room for all rows of what a part has some of."""
    return part.new_empty((len(weight_OI), *part.shape[1:]))


def round_in_place(weight_OI: Tensor, scheme: Scheme) -> Tensor:
    """The weight, its values being those that their codes stand for."""
    for start, part in _parts(weight_OI, scheme):
        weight_OI[start : start + len(part.codes_OI)] = part.dequantize()
    return weight_OI


def _parts(weight_OI: Tensor, scheme: Scheme) -> Iterator[tuple[int, QuantizedWeight]]:
    at_once = max(1, _AT_ONCE // weight_OI.shape[1])
    for start in range(0, len(weight_OI), at_once):
        yield start, Rtn().quantize(weight_OI[start : start + at_once], scheme)
