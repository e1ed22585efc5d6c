"""The short way of one token: the same numbers from fewer nodes, and a graph that can be had without it."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from llmopt.export.onnx import one_token
from llmopt.export.onnx.graph import GRAPH_FILE, Graph
from llmopt.export.onnx.linear import Product, emit
from llmopt.export.onnx.one_token import add_short_ways, without_short_ways
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from tests.onnx_nodes import Array, open_graph, relative_error

WIDTH, CHANNELS = 80, 24


def product(name: str, channels: int = CHANNELS, *, biased: bool = False) -> Product:
    generator = torch.Generator().manual_seed(channels)
    weight = Rtn().quantize(torch.randn((channels, WIDTH), generator=generator), parse_scheme("w8a8"))
    return Product(name, weight, torch.randn(channels, generator=generator) if biased else None)


def opened(folder: Path, products: list[Product], *, short: bool) -> onnxruntime.InferenceSession:
    """Products of one input, each with something behind it that reads its result."""
    folder.mkdir()
    graph = Graph(folder)
    graph.input("x", TensorProto.FLOAT, ["batch", "tokens", WIDTH])
    outputs = [graph.node("Neg", [emit(graph, "x", each)], f"{each.name}/negated") for each in products]
    if short:
        add_short_ways(graph)
    return open_graph(graph, dict.fromkeys(outputs, TensorProto.FLOAT))


def kinds(folder: Path) -> list[str]:
    return [node.op_type for node in onnx.load(folder / GRAPH_FILE, load_external_data=False).graph.node]


def tokens(batch: int, count: int) -> Array:
    return np.random.default_rng(0).normal(1, 2, (batch, count, WIDTH)).astype(np.float32)


PRODUCTS = [
    [product("up")],
    [product("up", biased=True)],
    [product("gate", biased=True), product("up", biased=True)],
    [product("q"), product("k", 8, biased=True), product("v", 8)],
]


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1), (2, 5)])
def test_either_way_gives_the_same_numbers(products: list[Product], shape: tuple[int, int], tmp_path: Path) -> None:
    x = tokens(*shape)
    expected = opened(tmp_path / "long", products, short=False).run(None, {"x": x})
    actual = opened(tmp_path / "short", products, short=True).run(None, {"x": x})
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < 1e-6


def test_one_token_takes_a_node_each(tmp_path: Path) -> None:
    opened(tmp_path / "short", PRODUCTS[2], short=True)
    graph = onnx.load(tmp_path / "short" / GRAPH_FILE, load_external_data=False).graph
    (either,) = (node for node in graph.node if node.op_type == "If")
    short = next(item.g for item in either.attribute if item.name == "then_branch")
    assert [node.op_type for node in short.node] == ["DynamicQuantizeMatMul"] * 2
    assert "MatMulIntegerToFloat" not in kinds(tmp_path / "short")


def test_a_row_of_zeros_stays_one(tmp_path: Path) -> None:
    session = opened(tmp_path / "short", [product("up")], short=True)
    assert not session.run(None, {"x": np.zeros((1, 1, WIDTH), np.float32)})[0].any()


@pytest.mark.parametrize("products", PRODUCTS)
def test_the_long_way_can_be_had_back(products: list[Product], tmp_path: Path) -> None:
    opened(tmp_path / "long", products, short=False)
    opened(tmp_path / "short", products, short=True)
    model = without_short_ways(onnx.load(tmp_path / "short" / GRAPH_FILE, load_external_data=False))
    left = [node for node in model.graph.node if node.op_type not in {"ReduceProd", "Equal"}]
    long = onnx.load(tmp_path / "long" / GRAPH_FILE, load_external_data=False).graph.node
    assert {node.name: node for node in left} == {node.name: node for node in long}
    known = {"x", "", *(tensor.name for tensor in model.graph.initializer)}
    for node in model.graph.node:
        assert known.issuperset(node.input), node.name
        known.update(node.output)


def test_large_products_have_the_long_way_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_token, "LARGEST_BYTES", WIDTH * CHANNELS - 1)
    opened(tmp_path / "short", [product("up")], short=True)
    assert "If" not in kinds(tmp_path / "short")
