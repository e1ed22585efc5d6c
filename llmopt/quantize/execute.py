"""What quantized linears compute, in plain torch: the reference that exported graphs are held against."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmopt.model.spec import Linear
from llmopt.quantize.weights import QuantizedWeight

Rounding = Callable[[Tensor], Tensor]

TOP = 255
SMALLEST_TOP = 1e-28  # of a row's range: a row of zeros has a step as well


def quantized_apply(
    weights: Mapping[str, Tensor | QuantizedWeight],
    linear: Linear,
    x: Tensor,
    *,
    round_activations: bool = True,
    rounding: Rounding | None = None,
) -> Tensor:
    """Y = x Ŵᵀ + b, where `weights` holds each linear's weight as [out, in], float or quantized.

    Without `round_activations`, those of a scheme with 8-bit activations stay as they are; `rounding`, by default
    `round_rows`, is what happens to them else.
    """
    weight = weights[linear.weight.name]
    bias = weights[f"{linear.name}.bias"] if linear.bias else None
    assert not isinstance(bias, QuantizedWeight)
    if not isinstance(weight, QuantizedWeight):
        return torch.nn.functional.linear(x, weight, bias)
    if weight.scheme.activation_bits == 8 and round_activations:
        x = (rounding or round_rows)(x)
    return torch.nn.functional.linear(x, weight.dequantize(), bias)


def round_rows(x: Tensor) -> Tensor:
    """Activations as 8 bits keep them: each row (a token) on 256 points over its range, 0 being one of them."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(SMALLEST_TOP)
    step = (low - high) * (-1 / TOP)
    zero = (low / (low - high) / (1 / TOP)).round()
    return (((x / step).round() + zero).clamp(0, TOP) - zero) * step


def round_rows_symmetric(x: Tensor) -> Tensor:
    """Activations as compressed-tensors keeps them in 8 bits: a row's largest magnitude is 127.5 steps."""
    step = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_TOP) / (TOP / 2)
    return (x / step).round().clamp(-128, 127) * step
