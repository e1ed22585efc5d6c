"""One linear as nodes: with its bias, alone or together with others of the same input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from llmopt.export.onnx.graph import Graph
from llmopt.export.onnx.linear import Product, emit, emit_together, stacked
from llmopt.quantize.grid import ANY_SCALE, HALF_SCALE, ScaleRule
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from llmopt.quantize.weights import QuantizedWeight
from tests.onnx_nodes import Array, float32_session, open_graph, relative_error

SCHEMES = [None, "w2a16", "w4a16", "w4a16-channel-sym", "w8a16", "w8a16-g128-asym", "w8a8"]
X = np.random.default_rng(0).normal(size=(2, 3, 72)).astype(np.float32)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(name: str, scheme: str | None, *, rows: int = 20, bias: bool = True, seed: int = 0) -> Product:
    weight = random(rows, 72, seed=seed)
    quantized = weight if scheme is None else Rtn().quantize(weight, parse_scheme(scheme))
    return Product(name, quantized, random(rows, seed=seed + 100) if bias else None)


def expected(of: Product) -> Array:
    weight = of.weight.dequantize() if isinstance(of.weight, QuantizedWeight) else of.weight
    y: Array = torch.nn.functional.linear(torch.from_numpy(X), weight, of.bias).numpy()
    return y


def new_graph(folder: Path) -> Graph:
    graph = Graph(folder)
    graph.input("x", TensorProto.FLOAT, ["batch", "tokens", 72])
    return graph


def run(graph: Graph, *outputs: str) -> list[Array]:
    """In float32, so that nothing but the weight is rounded."""
    open_graph(graph, outputs)
    values: list[Array] = float32_session(graph.folder).run(None, {"x": X})
    return values


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_linear_is_x_times_its_weight_plus_its_bias(tmp_path: Path, scheme: str | None, bias: bool) -> None:
    graph, linear = new_graph(tmp_path), product("up", scheme, bias=bias)
    (y,) = run(graph, emit(graph, "x", linear))
    assert relative_error(y, expected(linear)) < 2e-6


@pytest.mark.parametrize(
    ("rule", "largest", "stored"),
    [(HALF_SCALE, 1.0, TensorProto.FLOAT16), (HALF_SCALE, 1e8, TensorProto.FLOAT), (ANY_SCALE, 1.0, TensorProto.FLOAT)],
)
def test_scales_take_two_bytes_where_that_loses_nothing(
    tmp_path: Path, rule: ScaleRule, largest: float, stored: int
) -> None:
    weight = random(20, 72, seed=0)
    weight[3, 5] = largest
    linear = Product("up", Rtn(scales=rule).quantize(weight, parse_scheme("w4a16")))
    graph = new_graph(tmp_path)
    (y,) = run(graph, emit(graph, "x", linear))
    assert graph.tensors["up.scales"].data_type == stored
    assert relative_error(y, expected(linear)) < 2e-6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_linears_that_agree_become_one_product(tmp_path: Path, scheme: str | None) -> None:
    graph = new_graph(tmp_path)
    parts = [product("q", scheme), product("k", scheme, rows=7, seed=1), product("v", scheme, rows=5, seed=2)]
    (y,) = run(graph, emit_together(graph, "x", "qkv", parts))
    assert relative_error(y, np.concatenate([expected(part) for part in parts], axis=-1)) < 2e-6
    assert sum("MatMul" in node.op_type for node in graph.nodes) == 1
    assert not any(node.name == "qkv/concat" for node in graph.nodes)


@pytest.mark.parametrize(
    "schemes",
    [("w4a16", "w8a16", None), ("w4a16", "w4a16-g64", "w4a16"), ("w8a8", "w8a16", "w8a8"), (None, None, "w8a8")],
)
def test_linears_that_differ_stay_apart_and_lie_side_by_side(tmp_path: Path, schemes: tuple[str | None, ...]) -> None:
    graph = new_graph(tmp_path)
    parts = [
        product(name, scheme, rows=5 + place, seed=place)
        for place, (name, scheme) in enumerate(zip("qkv", schemes, strict=True))
    ]
    (y,) = run(graph, emit_together(graph, "x", "qkv", parts))
    assert relative_error(y, np.concatenate([expected(part) for part in parts], axis=-1)) < 2e-6
    assert sum("MatMul" in node.op_type for node in graph.nodes) == 3


def test_a_bias_on_some_keeps_linears_apart(tmp_path: Path) -> None:
    graph = new_graph(tmp_path)
    parts = [product("q", "w8a16"), product("k", "w8a16", bias=False, seed=1)]
    assert stacked("qk", parts) is None
    (y,) = run(graph, emit_together(graph, "x", "qk", parts))
    assert relative_error(y, np.concatenate([expected(part) for part in parts], axis=-1)) < 2e-6
