"""Grids: which values a group of weights may take, and how its scale and zero point are found.

Everything here is tensors in, tensors out. Groups are [out, groups, size]; a last group that is not full is padded
with zeros, which every grid represents exactly.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

TINY = torch.finfo(torch.float32).tiny
FEW_BITS, FEW_BITS_RANGE = 4, 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRule:
    """What scales may be, which is for the engine to say and not for the scheme.

    `signed`: those of symmetric schemes may be negative. `dtype`: what they are stored in; codes are found for scales
    as they are stored. `widens`: a weight with a scale too large for that is stored with float32 ones.
    """

    signed: bool = True
    dtype: torch.dtype = torch.float32
    widens: bool = False

    def stored(self, scales: Tensor) -> Tensor:
        """Scales as they are when they are read again, float32; none is rounded to 0 or to infinity."""
        if self.dtype == torch.float32:
            return scales
        limits = torch.finfo(self.dtype)
        # eps * tiny is the smallest number of all, below the normal ones; half of it would be rounded to 0.
        magnitude = scales.abs().clamp(limits.tiny * limits.eps, limits.max)
        stored = torch.copysign(magnitude, scales).to(self.dtype).float()
        return torch.where(scales.abs() > limits.max, scales, stored) if self.widens else stored


ANY_SCALE = ScaleRule()
HALF_SCALE = ScaleRule(dtype=torch.float16, widens=True)


def grouped(weight_OI: Tensor, group_size: int | None) -> Tensor:
    """[out, in] as [out, groups, size], the last group padded with zeros."""
    size = group_size or weight_OI.shape[1]
    padding = -weight_OI.shape[1] % size
    return torch.nn.functional.pad(weight_OI, (0, padding)).reshape(len(weight_OI), -1, size)


def without_dead_outliers(weight_OI: Tensor, importance_I: Tensor, group_size: int | None) -> Tensor:
    """The weights, those of inputs that never were anything but 0 no larger than the others of their group.

    Such weights are multiplied by nothing, and a large one would take the group's grid away from those that are.
    """
    if bool(importance_I.all()):
        return weight_OI
    dead_GS = grouped(importance_I[None], group_size)[0] == 0
    groups_OGS = grouped(weight_OI, group_size)
    largest_OG1 = groups_OGS.abs().masked_fill(dead_GS, 0).amax(-1, keepdim=True)
    # Where no input of a group is alive, all of its weights count alike.
    clipped_GS = dead_GS & ~dead_GS.all(-1, keepdim=True)
    bounded_OGS = torch.where(clipped_GS, groups_OGS.clamp(-largest_OG1, largest_OG1), groups_OGS)
    return bounded_OGS.flatten(1)[:, : weight_OI.shape[1]].contiguous()


def quantize_to(weight_OI: Tensor, scheme: Scheme, scales_OG: Tensor, zero_points_OG: Tensor | None) -> QuantizedWeight:
    """Round each weight to the nearest point of a given grid."""
    groups_OGS = grouped(weight_OI, scheme.group_size)
    zeros = 2.0 ** (scheme.bits - 1) if zero_points_OG is None else zero_points_OG[..., None].float()
    codes_OGS = round_to_codes(groups_OGS, scales_OG[..., None], zeros, scheme.levels)
    return QuantizedWeight(
        scheme=scheme,
        codes_OI=codes_OGS.flatten(1)[:, : weight_OI.shape[1]].to(torch.uint8).contiguous(),
        scales_OG=scales_OG,
        zero_points_OG=zero_points_OG,
    )


def round_to_codes(groups_OGS: Tensor, scales: Tensor, zeros: Tensor | float, levels: int) -> Tensor:
    """Codes as floats: clamp(round(w / scale) + zero, 0, levels - 1)."""
    return groups_OGS.div(scales).round_().add_(zeros).clamp_(0, levels - 1)


def shrinks_to_try(scheme: Scheme, clip_range: float, steps: int) -> list[float]:
    """Ranges to search among, as parts of the full one: from that down to `clip_range` less, in so many steps.

    Of four levels each has a quarter of the weights to stand for, and the best range of a long row ends far within
    its tails: there it is searched down to a quarter, in steps no larger.
    """
    if scheme.bits < FEW_BITS and clip_range < FEW_BITS_RANGE:
        clip_range, steps = FEW_BITS_RANGE, ceil(steps * FEW_BITS_RANGE / clip_range)
    return [1 - clip_range * step / steps for step in range(steps)]


def find_grid(
    weight_OI: Tensor,
    scheme: Scheme,
    shrinks: Sequence[float],
    importance_I: Tensor | None = None,
    rule: ScaleRule = ANY_SCALE,
) -> tuple[Tensor, Tensor | None]:
    """Scales [out, groups] and, for an asymmetric scheme, zero points: of each group's range as it is, or smaller by
    a factor, that which leaves the least squared error, where `importance_I` says how much each input's error counts.
    """
    groups_OGS = grouped(weight_OI, scheme.group_size)
    importance = None if importance_I is None else grouped(importance_I[None], scheme.group_size)
    if scheme.symmetric:
        half = 2.0 ** (scheme.bits - 1)
        divisors = [half / shrink for shrink in shrinks]
        return symmetric_scales(groups_OGS, scheme.bits, divisors, importance, rule), None
    scales_OG, zero_points_OG = asymmetric_grid(groups_OGS, scheme.bits, shrinks, importance, rule)
    return scales_OG, zero_points_OG.to(torch.uint8)


def symmetric_scales(
    groups_OGS: Tensor,
    bits: int,
    divisors: Iterable[float],
    importance: Tensor | None = None,
    rule: ScaleRule = ANY_SCALE,
) -> Tensor:
    """Scales of a grid around zero, [out, groups]: the candidate with the least squared error wins.

    The codes reach one step further down than up, so a scale takes the sign that puts the largest weight of its group
    on the outermost code: at `divisor` 2**(bits - 1) exactly there, clipped at larger ones. Where scales may not be
    negative, neither tail is clipped at that divisor.
    """
    half = 2.0 ** (bits - 1)
    outermost_OG = outermost(groups_OGS, half, rule)
    zeros_OG = torch.full_like(outermost_OG, half)
    candidates = [(rule.stored(outermost_OG / divisor), zeros_OG) for divisor in divisors]
    return least_error(groups_OGS, candidates, 2**bits, importance)[0]


def outermost(groups: Tensor, half: float, rule: ScaleRule) -> Tensor:
    """What a code of `half` would stand for where a group fills the codes from -half to half - 1; never 0.

    That is `half` times the scale that clips nothing, unless a sign lets the smaller tail be clipped. Reduces the last
    axis.
    """
    if rule.signed:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        return -torch.where(largest < 0, largest.clamp_max(-TINY), largest.clamp_min(TINY))
    return torch.maximum(groups.amax(-1) / (half - 1) * half, -groups.amin(-1)).clamp_min(TINY)


def asymmetric_grid(
    groups_OGS: Tensor,
    bits: int,
    shrinks: Iterable[float],
    importance: Tensor | None = None,
    rule: ScaleRule = ANY_SCALE,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points that cover [min(w, 0), max(w, 0)] times a shrink, chosen by least squared error.

    Zero is always on the grid, so that padding and pruned weights stay exactly zero.
    """
    low_OG, high_OG = groups_OGS.amin(-1).clamp_max(0), groups_OGS.amax(-1).clamp_min(0)
    top = 2**bits - 1
    candidates = []
    for shrink in shrinks:
        # Divided first: the difference of two large weights may be infinite.
        scales = rule.stored((high_OG * (shrink / top) - low_OG * (shrink / top)).clamp_min(TINY))
        zeros = (-low_OG * shrink / scales).round_().clamp_(0, top)
        candidates.append((scales, zeros))
    return least_error(groups_OGS, candidates, 2**bits, importance)


def least_error(
    groups_OGS: Tensor, candidates: list[tuple[Tensor, Tensor]], levels: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each group the (scale, zero point) whose rounding leaves the least squared error; the first wins a tie.

    `importance`, of a shape that broadcasts to that of the groups, weighs the squares.
    """
    best_scales, best_zeros = (tensor.clone() for tensor in candidates[0])
    best_error = torch.full_like(best_scales, torch.inf)
    for scales, zeros in candidates:
        codes = round_to_codes(groups_OGS, scales[..., None], zeros[..., None], levels)
        squares = codes.sub_(zeros[..., None]).mul_(scales[..., None]).sub_(groups_OGS).square_()
        error = (squares if importance is None else squares.mul_(importance)).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros
