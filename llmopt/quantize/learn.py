"""A quantized weight that learns: its scales and roundings follow the gradient of whatever its outputs are to match.

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (arXiv
2309.05516), section 3: each weight has an offset that is added before rounding, and goes a small step against the sign
of its gradient, which passes through the rounding as if that were not there. Offsets of a weight that GPTQ has rounded
start where the float weight is, within the cell of its code. Scales, of which there are far fewer, follow Adam.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.quantize.grid import ANY_SCALE, ScaleRule, grouped
from llmopt.quantize.weights import QuantizedWeight

START = 0.45  # of a code, so that no offset begins where the next step changes what it is rounded to
ADAM_FIRST, ADAM_SECOND, ADAM_EPSILON = 0.9, 0.99, 1e-12


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How far a step goes: an offset in codes, a scale as a part of itself."""

    offset: float = 0.003
    scale: float = 0.001


class LearnedWeight:
    """Codes and scales on their way from those of `weight`, which quantizes `float_OI`; both [out, in].

    Roundings of schemes with 8-bit activations stay as they are: neighbouring codes limit each other, and there is
    little to gain.
    """

    def __init__(self, weight: QuantizedWeight, float_OI: Tensor, rates: Rates, rule: ScaleRule = ANY_SCALE) -> None:
        self.weight = weight
        self.rates = rates
        self.rule = rule
        self.columns = weight.codes_OI.shape[1]
        self.learns_rounding = weight.scheme.activation_bits != 8
        zeros_OG = weight.zero_points_OG
        self.zeros = torch.tensor(2.0 ** (weight.scheme.bits - 1)) if zeros_OG is None else zeros_OG.float()[..., None]
        codes_OGS = self._grouped(weight.codes_OI).float()
        exact_OGS = self._grouped(float_OI) / weight.scales_OG[..., None] + self.zeros
        self.place_OGS = codes_OGS + (exact_OGS - codes_OGS).clamp_(-START, START)  # among the codes, before rounding
        self.levels_OGS = codes_OGS - self.zeros  # what scales are multiplied by
        self.signs_OG1 = weight.scales_OG.sign()[..., None]
        self.change_OG = torch.zeros(weight.scales_OG.shape)
        self.mean_OG, self.square_OG = torch.zeros_like(self.change_OG), torch.zeros_like(self.change_OG)
        self.steps = 0

    def dense(self) -> Tensor:
        """The weight as it is now, [out, in] float32."""
        return (self.levels_OGS * self._scales()[..., None]).flatten(1)[:, : self.columns]

    def step(self, gradient_OI: Tensor, left: float) -> None:
        """Follow the gradient of a loss by `dense()`, and use it up; `left` of the rates is left, from 1 down to 0."""
        self.steps += 1
        gradient_OGS = self._grouped(gradient_OI)
        self._step_scales((gradient_OGS * self.levels_OGS).sum(-1) * self.weight.scales_OG, left)
        if self.learns_rounding:
            self.place_OGS.sub_(gradient_OGS.sign_().mul_(self.signs_OG1), alpha=self.rates.offset * left)
            torch.round(self.place_OGS, out=self.levels_OGS)
            self.levels_OGS.clamp_(0, self.weight.scheme.levels - 1).sub_(self.zeros)

    def quantized(self) -> QuantizedWeight:
        """What it has become; `dense()` is what this stands for."""
        codes_OGS = self.levels_OGS + self.zeros
        return QuantizedWeight(
            scheme=self.weight.scheme,
            codes_OI=codes_OGS.flatten(1)[:, : self.columns].to(torch.uint8).contiguous(),
            scales_OG=self._scales(),
            zero_points_OG=self.weight.zero_points_OG,
        )

    def _step_scales(self, gradient_OG: Tensor, left: float) -> None:
        self.mean_OG.lerp_(gradient_OG, 1 - ADAM_FIRST)
        self.square_OG.lerp_(gradient_OG.square(), 1 - ADAM_SECOND)
        mean_OG = self.mean_OG / (1 - ADAM_FIRST**self.steps)
        size_OG = (self.square_OG / (1 - ADAM_SECOND**self.steps)).sqrt_().add_(ADAM_EPSILON)
        self.change_OG.addcdiv_(mean_OG, size_OG, value=-self.rates.scale * left)

    def _scales(self) -> Tensor:
        return self.rule.stored(self.weight.scales_OG * (1 + self.change_OG))

    def _grouped(self, values_OI: Tensor) -> Tensor:
        return grouped(values_OI, self.weight.scheme.group_size)
