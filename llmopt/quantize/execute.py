"""What quantized linears compute, in plain torch: the reference that exported graphs are held against."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmopt.model.spec import Linear
from llmopt.quantize.weights import QuantizedWeight

TOP = 255
SMALLEST_WIDTH = 1e-30  # stands in for the width of a row whose values are all equal


def quantized_apply(
    weights: Mapping[str, Tensor | QuantizedWeight], linear: Linear, x: Tensor, *, round_activations: bool = True
) -> Tensor:
    """Y = x Ŵᵀ + b, where `weights` holds each linear's weight as [out, in], float or quantized.

    Without `round_activations`, those of a scheme with 8-bit activations stay as they are.
    """
    weight = weights[linear.weight.name]
    bias = weights[f"{linear.name}.bias"] if linear.bias else None
    assert not isinstance(bias, QuantizedWeight)
    if not isinstance(weight, QuantizedWeight):
        return torch.nn.functional.linear(x, weight, bias)
    if weight.scheme.activation_bits == 8 and round_activations:
        x = round_rows(x)
    return torch.nn.functional.linear(x, weight.dequantize(), bias)


def round_rows(x: Tensor) -> Tensor:
    """Activations as 8 bits keep them: each row (a token) on 256 points from its lowest value to its highest."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    width = (high - low).clamp_min(SMALLEST_WIDTH)
    return low + ((x - low) / width * TOP).round_() * (width / TOP)
