"""Grids: which values a group of weights may take, and how its scale and zero point are found.

Everything here is tensors in, tensors out. Groups are [out, groups, size]; a last group that is not full is padded
with zeros, which every grid represents exactly.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

TINY = torch.finfo(torch.float32).tiny
# Activations of the int8 kernel lie in [1, 255] around 128; see `pair_safe_scales`.
INT8_LIMIT = 127


def grouped(weight_OI: Tensor, group_size: int | None) -> Tensor:
    """[out, in] as [out, groups, size], the last group padded with zeros."""
    size = group_size or weight_OI.shape[1]
    padding = -weight_OI.shape[1] % size
    return torch.nn.functional.pad(weight_OI, (0, padding)).reshape(len(weight_OI), -1, size)


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


def symmetric_scales(groups_OGS: Tensor, bits: int, divisors: Iterable[float]) -> Tensor:
    """Scales of a grid around zero, [out, groups]: the candidate with the least squared error wins.

    A candidate is ±max|w| / divisor. At `divisor` 2**(bits - 1) the largest weight sits on the outermost code, whose
    sign the scale's sign decides; larger divisors clip.
    """
    largest_OG = groups_OGS.abs().amax(-1).clamp_min(TINY)
    half = 2.0 ** (bits - 1)
    candidates = [sign * largest_OG / divisor for divisor in divisors for sign in (-1.0, 1.0)]
    best = least_error(groups_OGS, [(scales, torch.full_like(scales, half)) for scales in candidates], 2**bits)
    return best[0]


def asymmetric_grid(groups_OGS: Tensor, bits: int, shrinks: Iterable[float]) -> tuple[Tensor, Tensor]:
    """Scales and zero points that cover [min(w, 0), max(w, 0)] times a shrink, chosen by least squared error.

    Zero is always on the grid, so that padding and pruned weights stay exactly zero.
    """
    low_OG, high_OG = groups_OGS.amin(-1).clamp_max(0), groups_OGS.amax(-1).clamp_min(0)
    top = 2**bits - 1
    candidates = []
    for shrink in shrinks:
        scales = ((high_OG - low_OG) * (shrink / top)).clamp_min(TINY)
        zeros = (-low_OG * shrink / scales).round_().clamp_(0, top)
        candidates.append((scales, zeros))
    return least_error(groups_OGS, candidates, 2**bits)


def least_error(groups_OGS: Tensor, candidates: list[tuple[Tensor, Tensor]], levels: int) -> tuple[Tensor, Tensor]:
    """For each group the (scale, zero point) whose rounding leaves the least squared error; the first wins a tie."""
    best_scales, best_zeros = (tensor.clone() for tensor in candidates[0])
    best_error = torch.full_like(best_scales, torch.inf)
    for scales, zeros in candidates:
        codes = round_to_codes(groups_OGS, scales[..., None], zeros[..., None], levels)
        error = codes.sub_(zeros[..., None]).mul_(scales[..., None]).sub_(groups_OGS).square_().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def pair_safe_scales(weight_OI: Tensor) -> Tensor:
    """Per-channel scales, [out, 1], for int8 products that no CPU saturates.

    Without VNNI, x86 multiplies unsigned activations by signed weights with `vpmaddubsw`, which adds the products of
    two neighbouring channels in 16 bits and clips at 32767. Both products can have the same sign up to
    255 * (w₁ + w₂), so the positive parts of each pair of codes, and the negative ones, may add up to 128 at most.
    Scaling each row by its largest such sum over 127 leaves one unit for the two roundings. Rows led by a single
    large weight, which are the rows that matter, lose next to nothing against max|w| / 127.
    """
    pairs_OPS = grouped(weight_OI, 2)
    positive = pairs_OPS.clamp_min(0).sum(-1).amax(-1, keepdim=True)
    negative = pairs_OPS.clamp_max(0).sum(-1).amin(-1, keepdim=True).neg()
    return torch.maximum(positive, negative).clamp_min(TINY) / INT8_LIMIT
