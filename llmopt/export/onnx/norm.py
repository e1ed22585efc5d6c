"""Norms as nodes, alone or with the sum that comes before them."""

import numpy as np

from llmopt.export.onnx.graph import MICROSOFT, Graph
from llmopt.export.onnx.weights import Weights, as_float
from llmopt.model.spec import Norm


def emit_norm(graph: Graph, x: str, norm: Norm, weights: Weights) -> str:
    """The norm of x over its last axis."""
    op = "SimplifiedLayerNormalization" if norm.kind == "rms" else "LayerNormalization"
    return graph.node(op, [x, *_inputs(graph, norm, weights)], norm.name, axis=-1, epsilon=norm.eps)


def emit_sum_and_norm(graph: Graph, residual: str, branch: str, norm: Norm, weights: Weights) -> tuple[str, str]:
    """The norm of residual + branch, and that sum, in one node."""
    op = "SkipSimplifiedLayerNormalization" if norm.kind == "rms" else "SkipLayerNormalization"
    inputs, outputs = [residual, branch, *_inputs(graph, norm, weights)], [f"{norm.name}/output", f"{norm.name}/sum"]
    places = [outputs[0], "", "", outputs[1]]
    graph.node(op, inputs, norm.name, outputs=places, domain=MICROSOFT, epsilon=norm.eps)
    return outputs[0], outputs[1]


def _inputs(graph: Graph, norm: Norm, weights: Weights) -> list[str]:
    scale = as_float(weights[f"{norm.name}.weight"]) + np.float32(norm.offset)
    inputs = [graph.tensor(f"{norm.name}.weight", scale)]
    if norm.bias:
        inputs.append(graph.tensor(f"{norm.name}.bias", as_float(weights[f"{norm.name}.bias"])))
    return inputs
