"""Norms as nodes, alone or with the sum that comes before them.

A norm gives the dtype of what it reads, or float32 if its weight is.
"""

import numpy as np

from llmopt.export.onnx.graph import MICROSOFT, Graph
from llmopt.export.onnx.weights import Weights, as_float
from llmopt.model.spec import Norm


def emit_norm(graph: Graph, x: str, norm: Norm, weights: Weights) -> str:
    """The norm of x over its last axis."""
    op = "SimplifiedLayerNormalization" if norm.kind == "rms" else "LayerNormalization"
    half, half_inside = _halves(graph, norm, weights, x)
    inputs = [graph.cast(x, half=half_inside), *_inputs(graph, norm, weights, half=half_inside)]
    return graph.cast(graph.node(op, inputs, norm.name, axis=-1, epsilon=norm.eps), half=half)


def emit_sum_and_norm(graph: Graph, residual: str, branch: str, norm: Norm, weights: Weights) -> tuple[str, str]:
    """The norm of residual + branch, and that sum, in one node."""
    op = "SkipSimplifiedLayerNormalization" if norm.kind == "rms" else "SkipLayerNormalization"
    half, half_inside = _halves(graph, norm, weights, residual, branch)
    terms = [graph.cast(term, half=half_inside) for term in (residual, branch)]
    inputs = [*terms, *_inputs(graph, norm, weights, half=half_inside)]
    outputs = [f"{norm.name}/output", f"{norm.name}/sum"]
    places = [outputs[0], "", "", outputs[1]]
    graph.node(op, inputs, norm.name, outputs=places, domain=MICROSOFT, epsilon=norm.eps)
    return graph.cast(outputs[0], half=half), graph.cast(outputs[1], half=half)


def _halves(graph: Graph, norm: Norm, weights: Weights, *terms: str) -> tuple[bool, bool]:
    """Whether what comes out is float16, and whether the kernel is one of float16.

    That would round a weight that has an offset once more, behind the sum of both.
    """
    half = all(term in graph.half for term in terms) and as_float(weights[f"{norm.name}.weight"]).dtype == np.float16
    return half, half and norm.offset == 0


def _inputs(graph: Graph, norm: Norm, weights: Weights, *, half: bool) -> list[str]:
    dtype = np.float16 if half else np.float32
    scale = as_float(weights[f"{norm.name}.weight"]).astype(np.float32) + np.float32(norm.offset)
    inputs = [graph.tensor(f"{norm.name}.weight", scale.astype(dtype))]
    if norm.bias:
        inputs.append(graph.tensor(f"{norm.name}.bias", as_float(weights[f"{norm.name}.bias"]).astype(dtype)))
    return inputs
