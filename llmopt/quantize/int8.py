"""Weights for int8 products: codes whose sums no instruction loses.

x86 CPUs without VNNI multiply unsigned activations by signed weights two channels at a time, and add the two products
in 16 bits, which saturate: 255 * 127 + 255 * 127 does not fit. Where two neighbouring codes of one sign add up to at
most 128, 255 * 128 does, whatever the activations, so every CPU computes the same and none needs a slower kernel.
"""

import torch
from torch import Tensor

from llmopt.quantize.grid import ANY_SCALE, TINY, ScaleRule, outermost
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

CENTER = 128
LARGEST_SUM = 128  # of two neighbouring codes: 255 * 128 < 2**15


def quantize_rows(weight_OI: Tensor, scheme: Scheme, rule: ScaleRule = ANY_SCALE) -> QuantizedWeight:
    """Round to nearest, one scale a row: the smallest at which neither a code nor a pair is clipped.

    Smaller ones were tried: what rounding gains, clipping loses.
    """
    outermost_O1 = outermost(weight_OI, CENTER, rule)[:, None]
    sums_O1 = pair_sums(weight_OI / LARGEST_SUM).abs().amax(1, keepdim=True)
    magnitude_O1 = torch.maximum(outermost_O1.abs() / CENTER, sums_O1).clamp_min(TINY)
    scales_O1 = rule.stored(torch.copysign(magnitude_O1, outermost_O1))
    # Rounding can still push a pair over by one.
    codes_OI = limit_pairs((weight_OI / scales_O1).round_().clamp_(-CENTER, CENTER - 1))
    codes_OI = codes_OI.add_(CENTER).to(torch.uint8)
    return QuantizedWeight(scheme=scheme, codes_OI=codes_OI, scales_OG=scales_O1, zero_points_OG=None)


def pair_sums(values_OI: Tensor) -> Tensor:
    """Sums of channels 0 and 1, 2 and 3, …, [out, ⌈in / 2⌉], where both have one sign; 0 elsewhere."""
    first, second = _pairs(values_OI).unbind(-1)
    return torch.where((first < 0) == (second < 0), first + second, 0)


def limit_pairs(codes_OI: Tensor) -> Tensor:
    """The nearest codes around 0 of which no pair's sum is too large: each of the two gives half of what is over."""
    sums = pair_sums(codes_OI)
    over = sums - sums.clamp(-LARGEST_SUM, LARGEST_SUM)
    half = (over / 2).trunc_()
    limited = _pairs(codes_OI) - torch.stack([half, over - half], -1)
    return limited.flatten(1)[:, : codes_OI.shape[1]]


def sums_fit(codes_OI: Tensor) -> bool:
    """Whether stored codes, uint8 around 128, can be multiplied by any activations without saturating."""
    return int(pair_sums(codes_OI.to(torch.int16) - CENTER).abs().max()) <= LARGEST_SUM


def _pairs(values_OI: Tensor) -> Tensor:
    """[out, ⌈in / 2⌉, 2]; a last channel that is alone has 0 beside it."""
    return torch.nn.functional.pad(values_OI, (0, values_OI.shape[1] % 2)).reshape(len(values_OI), -1, 2)
