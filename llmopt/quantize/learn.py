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
from llmopt.quantize.weights import QuantizedWeight, spread

START = 0.45  # of a code, so that no offset begins where the next step changes what it is rounded to
FARTHEST = 1.0  # from the first code: a code changes by one at most
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
        columns = weight.codes_OI.shape[1]
        self.group = weight.scheme.group_size or columns
        middle = 2.0 ** (weight.scheme.bits - 1)
        zeros_OG = weight.zero_points_OG
        self.zeros_OI = torch.tensor(middle) if zeros_OG is None else spread(zeros_OG, self.group, columns)
        self.codes_OI = weight.codes_OI.float()
        self.learns_rounding = weight.scheme.activation_bits != 8
        exact_OI = float_OI / spread(weight.scales_OG, self.group, columns) + self.zeros_OI
        self.offsets_OI = (exact_OI - self.codes_OI).clamp_(-START, START)
        self.change_OG = torch.zeros(weight.scales_OG.shape)
        self.mean_OG, self.square_OG = torch.zeros_like(self.change_OG), torch.zeros_like(self.change_OG)
        self.steps = 0

    def dense(self) -> Tensor:
        """The weight as it is now, [out, in] float32."""
        return (self._codes() - self.zeros_OI) * self._spread_scales()

    def step(self, gradient_OI: Tensor, left: float) -> None:
        """Follow the gradient of a loss by `dense()`; `left` is what is left of the rates, from 1 down to 0."""
        self.steps += 1
        by_scale_OI = gradient_OI * (self._codes() - self.zeros_OI)
        by_change_OG = grouped(by_scale_OI, self.group).sum(-1) * self.weight.scales_OG
        if self.learns_rounding:
            signs_OI = gradient_OI.sign().mul_(spread(self.weight.scales_OG.sign(), self.group, gradient_OI.shape[1]))
            self.offsets_OI.sub_(signs_OI, alpha=self.rates.offset * left).clamp_(-FARTHEST, FARTHEST)
        self.mean_OG.lerp_(by_change_OG, 1 - ADAM_FIRST)
        self.square_OG.lerp_(by_change_OG.square(), 1 - ADAM_SECOND)
        mean_OG = self.mean_OG / (1 - ADAM_FIRST**self.steps)
        size_OG = (self.square_OG / (1 - ADAM_SECOND**self.steps)).sqrt_().add_(ADAM_EPSILON)
        self.change_OG.addcdiv_(mean_OG, size_OG, value=-self.rates.scale * left)

    def quantized(self) -> QuantizedWeight:
        """What it has become; `dense()` is what this stands for."""
        return QuantizedWeight(
            scheme=self.weight.scheme,
            codes_OI=self._codes().to(torch.uint8),
            scales_OG=self._scales(),
            zero_points_OG=self.weight.zero_points_OG,
        )

    def _codes(self) -> Tensor:
        if not self.learns_rounding:
            return self.codes_OI
        return (self.codes_OI + self.offsets_OI).round_().clamp_(0, self.weight.scheme.levels - 1)

    def _scales(self) -> Tensor:
        return self.rule.stored(self.weight.scales_OG * (1 + self.change_OG))

    def _spread_scales(self) -> Tensor:
        return spread(self._scales(), self.group, self.codes_OI.shape[1])
