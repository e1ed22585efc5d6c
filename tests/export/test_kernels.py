"""The kernels that a product can have: what is tried, and that all of them compute the same."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llmopt.engine.ort import open_session
from llmopt.export.onnx.graph import Graph
from llmopt.export.onnx.kernels import Kernel, Shape, candidates, default_kernel
from llmopt.export.onnx.linear import Product, emit
from llmopt.export.onnx.probe import one_product
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from tests.onnx_nodes import open_graph, relative_error

SCHEMES = ["w2a16", "w2a16-channel-asym", "w4a16", "w4a16-g64-sym", "w4a16-channel-asym", "w8a16", "w8a16-channel-asym"]


def shape(scheme: str, columns: int = 512, rows: int = 24) -> Shape:
    return Shape(scheme=parse_scheme(scheme), rows=rows, columns=columns)


def test_groups_leave_the_activations_to_choose() -> None:
    levels = [(kernel.block_size, kernel.accuracy_level) for kernel in candidates(shape("w4a16-g64"))]
    assert levels == [(64, 4), (64, 0)]


def test_rows_with_one_scale_can_be_cut_into_larger_blocks_but_not_into_smaller_ones() -> None:
    sizes = {kernel.block_size for kernel in candidates(shape("w8a16-channel"))}
    assert sizes == {128, 256}
    assert {kernel.block_size for kernel in candidates(shape("w8a16-channel", columns=576))} == {64}


def test_of_two_bits_int8_is_offered_where_there_is_such_a_kernel() -> None:
    levels = [(kernel.block_size, kernel.accuracy_level) for kernel in candidates(shape("w2a16-channel"))]
    assert levels == [(128, 4), (128, 0), (256, 0)]
    assert default_kernel(shape("w2a16-channel", columns=80)) == Kernel(block_size=16, accuracy_level=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_default_comes_first_and_names_differ(scheme: str) -> None:
    kernels = candidates(shape(scheme))
    assert kernels[0] == default_kernel(shape(scheme))
    assert len({kernel.name for kernel in kernels}) == len(kernels)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kernel_computes_the_product(scheme: str, tmp_path: Path) -> None:
    weight = Rtn().quantize(torch.randn((24, 512), generator=torch.Generator().manual_seed(0)), parse_scheme(scheme))
    x = np.random.default_rng(0).normal(size=(1, 3, 512)).astype(np.float32)
    expected = x @ weight.dequantize().numpy().T
    for place, kernel in enumerate(candidates(Shape.of(weight, every_token=True))):
        folder = tmp_path / str(place)
        folder.mkdir()
        graph = Graph(folder, lambda shape, kernel=kernel: kernel)
        graph.input("x", 1, ["batch", "tokens", 512])
        (actual,) = open_graph(graph, [emit(graph, "x", Product("up", weight))]).run(None, {"x": x})
        assert relative_error(actual, expected) < (0.02 if kernel.accuracy_level == 4 else 2e-6), kernel.name
        (node,) = graph.nodes
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        assert Kernel(block_size=sizes["block_size"], accuracy_level=sizes["accuracy_level"]) == kernel


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_of_them_can_be_timed(scheme: str) -> None:
    for kernel in candidates(shape(scheme, columns=256)):
        session = open_session(one_product(shape(scheme, columns=256), kernel), Path(), threads=1)
        (y,) = session.run(None, {"x": np.ones((3, 256), np.float32)})
        assert y.shape == (3, 24)


def test_of_a_large_weight_as_many_rows_are_timed_as_fill_a_cache() -> None:
    assert shape("w4a16", columns=4096, rows=128_000).timed().rows == 4096
    assert shape("w4a16").timed() == shape("w4a16")
