"""Weights as they are given to the graph: under the names of the checkpoint, float or quantized."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmopt.export.onnx.linear import Product
from llmopt.model.spec import Linear
from llmopt.quantize.weights import QuantizedWeight

Weights = Mapping[str, Tensor | QuantizedWeight]


def as_float(tensor: Tensor | QuantizedWeight) -> NDArray[np.floating[Any]]:
    """A tensor that no scheme applies to, float32 or float16."""
    assert not isinstance(tensor, QuantizedWeight)
    values: NDArray[np.floating[Any]] = tensor.numpy()
    return values


def product(linear: Linear, weights: Weights) -> Product:
    """A linear with its weight and bias, [out, in] whatever way round the checkpoint keeps it."""
    weight = weights[linear.weight.name]
    bias = weights[f"{linear.name}.bias"] if linear.bias else None
    assert not isinstance(bias, QuantizedWeight)
    return Product(linear.name, weight, bias)
