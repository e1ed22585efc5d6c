"""Fake quantization: a weight that is rounded in every step, and learns through the rounding, as does its step size.

Esser et al. 2020, "Learned Step Size Quantization" (arXiv 1902.08153), section 2: ŵ = s · clip(round(w / s)), with
straight-through gradients, 1 by w where the code is what w rounds to and 0 where it was clipped, and by s

    round(w / s) - w / s    where it is what w rounds to,
    the outermost code      where it was clipped,

times 1 / √(N Qp), with N weights to a step and codes up to Qp.

Latent weights are counted in steps of the quantization that they start from, and step sizes as multiples of what they
were there: one rate then suits all layers, whose weights differ in size by orders of magnitude. What is computed with
is at all times what is stored: the same grids, scales rounded as engines keep them, and for int8 products pairs of
codes that no instruction saturates on.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.quantize.grid import ANY_SCALE, ScaleRule, grouped
from llmopt.quantize.int8 import limit_pairs
from llmopt.quantize.weights import QuantizedWeight

MOST = 0.499  # of a code, from it: rounding finds the same one
CACHED_WEIGHTS = 2**17  # a few tensors of so many float32 are in the cache of a core together


class FakeQuantizedWeight(nn.Module):
    """A weight, [out, in], on its way from `weight`, which quantizes `float_OI` (None: latents start at their codes).

    With a `rank`, its latents move by a product of two thin matrices only (Hu et al. 2021, arXiv 2106.09685), which is
    added before they are rounded, so nothing of it is left in what ships.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        float_OI: Tensor | None = None,
        rule: ScaleRule = ANY_SCALE,
        rank: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.rule = rule
        self.rows, self.columns = weight.codes_OI.shape
        half = torch.full((1, 1, 1), 2.0 ** (weight.scheme.bits - 1))
        zeros_OG = weight.zero_points_OG
        # No buffers, which processes that train together would send each other in every step: they do not change.
        low_OG1 = -(half if zeros_OG is None else zeros_OG.float()[..., None])
        self.low_OG1 = low_OG1.expand(self.rows, -1, -1)
        self.start_OG1 = weight.scales_OG[..., None].clone()
        latent_OGS = self._latent(float_OI)
        self.ratio_OG1 = nn.Parameter(torch.ones_like(self.start_OG1))
        self.rank = rank
        if rank is None:
            self.latent_OGS = nn.Parameter(latent_OGS)
            return
        self.base_OGS = latent_OGS
        # So that a change of what writes the outputs, which starts from 0, changes latents by as much.
        self.read_RI = nn.Parameter(torch.randn((rank, self.columns), generator=generator) * rank**-0.5)
        self.write_OR = nn.Parameter(torch.zeros((self.rows, rank)))

    def forward(self) -> Tensor:
        """The weight as it is stored, [out, in] float32; differentiable."""
        dense_OGS: Tensor = _LearnedStep.apply(self.latent(), self.ratio_OG1, self)  # type: ignore[no-untyped-call]
        return dense_OGS.flatten(1)[:, : self.columns]

    def latent(self) -> Tensor:
        """In steps of the start, before it is rounded, [out, groups, size]."""
        if self.rank is None:
            return self.latent_OGS
        return self.base_OGS + grouped(self.write_OR @ self.read_RI, self.weight.scheme.group_size)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """What it has become; `forward()` is what this stands for."""
        step_OG1 = self.step_sizes()
        codes_OGS = self.codes(self.latent() * (self.start_OG1 / step_OG1)) - self.low_OG1
        return QuantizedWeight(
            scheme=self.weight.scheme,
            codes_OI=codes_OGS.flatten(1)[:, : self.columns].to(torch.uint8).contiguous(),
            scales_OG=step_OG1[..., 0],
            zero_points_OG=self.weight.zero_points_OG,
        )

    def step_sizes(self) -> Tensor:
        """As they are stored, [out, groups, 1]."""
        return self.rule.stored(self.start_OG1 * self.ratio_OG1.detach())

    def codes(self, places_OGS: Tensor, rows: slice = slice(None)) -> Tensor:
        """The codes, less the zero point, of latents in steps of now, those of some rows; in their place."""
        low_OG1 = self.low_OG1[rows]
        codes_OGS = places_OGS.round_().clamp_(low_OG1, low_OG1 + (self.weight.scheme.levels - 1))
        if self.weight.scheme.activation_bits == 8:
            return limit_pairs(codes_OGS.flatten(1)).view_as(codes_OGS)
        return codes_OGS

    def _latent(self, float_OI: Tensor | None) -> Tensor:
        """Where the float weight is, within the cell of its code."""
        codes_OGS = self._grouped(self.weight.codes_OI.float()) + self.low_OG1
        if float_OI is None:
            return codes_OGS
        exact_OGS = self._grouped(float_OI) / self.start_OG1
        return codes_OGS + within_cell(exact_OGS - codes_OGS)

    def _grouped(self, values_OI: Tensor) -> Tensor:
        return grouped(values_OI, self.weight.scheme.group_size)


class _LearnedStep(torch.autograd.Function):
    """From latents in steps of the start, [out, groups, size], and ratios, [out, groups, 1], to the rounded weight.

    Some rows at a time, so that what is done to them one thing after the other is done in the processor's cache. Codes
    are found again for the gradients, not kept.
    """

    @staticmethod
    def forward(ctx: Any, latent_OGS: Tensor, ratio_OG1: Tensor, owner: FakeQuantizedWeight) -> Tensor:
        step_OG1 = owner.step_sizes()
        factor_OG1 = owner.start_OG1 / step_OG1
        dense_OGS = torch.empty_like(latent_OGS)
        for rows in _some_rows(latent_OGS):
            codes_OGS = owner.codes(latent_OGS[rows] * factor_OG1[rows], rows)
            torch.mul(codes_OGS, step_OG1[rows], out=dense_OGS[rows])
        ctx.save_for_backward(latent_OGS, factor_OG1)
        ctx.owner = owner
        return dense_OGS

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient_OGS,) = gradients
        latent_OGS, factor_OG1 = ctx.saved_tensors
        owner: FakeQuantizedWeight = ctx.owner
        by_latent_OGS, by_step_OG1 = torch.empty_like(latent_OGS), torch.empty_like(factor_OG1)
        for rows in _some_rows(latent_OGS):
            gradient = gradient_OGS[rows]
            places = latent_OGS[rows] * factor_OG1[rows]
            codes = owner.codes(places.clone(), rows)
            residual = codes - places
            clipped = residual.abs() > 0.5
            by_step_OG1[rows] = torch.where(clipped, codes, residual).mul_(gradient).sum(-1, keepdim=True)
            torch.mul(gradient, owner.start_OG1[rows], out=by_latent_OGS[rows]).masked_fill_(clipped, 0.0)
        size, largest = latent_OGS.shape[-1], 2 ** (owner.weight.scheme.bits - 1) - 1
        return by_latent_OGS, by_step_OG1 * owner.start_OG1 * (size * largest) ** -0.5, None


def _some_rows(values_OGS: Tensor) -> Iterator[slice]:
    rows = len(values_OGS)
    step = max(1, CACHED_WEIGHTS * rows // values_OGS.numel())
    yield from (slice(start, start + step) for start in range(0, rows, step))


def within_cell(offsets: Tensor) -> Tensor:
    """Offsets from codes, in codes, those beyond the boundary of a cell mirrored at it.

    A code that a method has moved away from the float weight is the harder to move back the farther that was. Offsets
    that were cut off at the boundary instead would all come to be rounded to other codes in the same few steps.
    """
    far = offsets.abs()
    return torch.where(far > 0.5, (1.0 - far).clamp_min_(0.0), far).clamp_max_(MOST).copysign_(offsets)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """What was rounded, with the gradient of what was not."""
    return x + (rounded - x).detach()
