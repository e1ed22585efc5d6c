"""The float32 twin of a graph: the same weights over the same data file, and no rounded activation."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from llmopt.export.onnx.graph import Graph
from llmopt.export.onnx.levels import in_float32
from llmopt.export.onnx.linear import Product, emit
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from tests.onnx_nodes import float32_session, open_graph, relative_error

X = np.random.default_rng(0).normal(size=(1, 9, 64)).astype(np.float32)


@pytest.mark.parametrize("name", ["w4a16", "w8a16", "w8a8"])
def test_activations_are_rounded_in_the_graph_and_not_in_its_twin(tmp_path: Path, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = Rtn().quantize(torch.randn((16, 64), generator=generator), parse_scheme(name))
    graph = Graph(tmp_path)
    graph.input("x", TensorProto.FLOAT, ["batch", "tokens", 64])
    shipped = open_graph(graph, [emit(graph, "x", Product("up", weight))]).run(None, {"x": X})[0]
    expected = X @ weight.dequantize().numpy().T
    assert relative_error(float32_session(tmp_path).run(None, {"x": X})[0], expected) < 2e-6
    assert relative_error(shipped, expected) > 1e-3


def test_other_nodes_stay_as_they_are(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    graph.input("x", TensorProto.FLOAT, ["batch", "tokens", 64])
    y = graph.node("Relu", [emit(graph, "x", Product("up", torch.ones(16, 64)))], "relu")
    open_graph(graph, [y])
    before = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert in_float32(onnx.load(tmp_path / "model.onnx", load_external_data=False)) == before
