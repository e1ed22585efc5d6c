"""What quantized linears compute, in plain torch: the reference that exported graphs are held against."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmopt.model.spec import Linear
from llmopt.quantize.weights import QuantizedWeight

INT8_TOP = 127
SMALLEST_ROW = 1e-30  # stands in for the largest magnitude of a row of zeros


def quantized_apply(weights: Mapping[str, Tensor | QuantizedWeight], linear: Linear, x: Tensor) -> Tensor:
    """Y = x Ŵᵀ + b, where `weights` holds each linear's weight as [out, in], float or quantized."""
    weight = weights[linear.weight.name]
    bias = weights[f"{linear.name}.bias"] if linear.bias else None
    assert not isinstance(bias, QuantizedWeight)
    if not isinstance(weight, QuantizedWeight):
        return torch.nn.functional.linear(x, weight, bias)
    if weight.scheme.activation_bits == 8:
        x = round_rows(x)
    return torch.nn.functional.linear(x, weight.dequantize(), bias)


def round_rows(x: Tensor) -> Tensor:
    """Activations as 8 bits keep them: each row (a token) on a grid of 255 points around zero, as wide as the row."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_ROW)
    return (x / largest * INT8_TOP).round_() * (largest / INT8_TOP)
