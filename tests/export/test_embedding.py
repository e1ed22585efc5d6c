"""The token table, quantized or not: rows as they stand for, and a head over the very same bytes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from llmopt.export.onnx.embedding import emit_embedding, emit_tied_head
from llmopt.export.onnx.graph import Graph
from llmopt.export.onnx.linear import Product
from llmopt.model.spec import Embedding
from llmopt.quantize.grid import HALF_SCALE
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from llmopt.quantize.weights import QuantizedWeight
from tests.onnx_nodes import float32_session, open_graph, relative_error

VOCABULARY = 31
IDS = np.array([[0, 30, 7], [7, 1, 2]])
SCHEMES = [
    None,
    "w2a16",
    "w2a16-asym",
    "w8a16",
    "w8a16-g32-asym",
    "w4a16",
    "w4a16-sym",
    "w4a16-g128",
    "w4a16-channel",
    "w8a8",
]
WIDTHS = [64, 72, 33]  # whole blocks, a last block that is not full, an odd one


def table_of(scheme: str | None, width: int) -> Tensor | QuantizedWeight:
    generator = torch.Generator().manual_seed(width)
    table = torch.randn((VOCABULARY, width), generator=generator)
    table += torch.linspace(-1, 1, VOCABULARY)[:, None]
    return table if scheme is None else Rtn(scales=HALF_SCALE).quantize(table, parse_scheme(scheme))


def as_float(table: Tensor | QuantizedWeight) -> np.ndarray:
    return (table.dequantize() if isinstance(table, QuantizedWeight) else table).numpy()


def new_graph(folder: Path, width: int) -> Graph:
    graph = Graph(folder)
    graph.input("input_ids", TensorProto.INT64, ["batch", "tokens"])
    graph.input("x", TensorProto.FLOAT, ["batch", "tokens", width])
    return graph


def embedding(width: int) -> Embedding:
    return Embedding(name="embed", vocab_size=VOCABULARY, width=width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_are_the_rows_that_the_table_stands_for(tmp_path: Path, scheme: str | None, width: int) -> None:
    graph, table = new_graph(tmp_path, width), table_of(scheme, width)
    hidden, _ = emit_embedding(graph, embedding(width), table)
    (rows,) = open_graph(graph, [hidden]).run([hidden], {"input_ids": IDS, "x": np.zeros((1, 1, width), np.float32)})
    np.testing.assert_array_equal(rows, as_float(table)[IDS])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_head_multiplies_by_the_table_and_writes_no_second_one(
    tmp_path: Path, scheme: str | None, width: int, bias: bool
) -> None:
    graph, table = new_graph(tmp_path, width), table_of(scheme, width)
    hidden, tensors = emit_embedding(graph, embedding(width), table)
    graph.data.file.flush()
    written = (tmp_path / "model.onnx.data").stat().st_size
    bias_V = torch.arange(float(VOCABULARY)) if bias else None
    logits = emit_tied_head(graph, "x", Product("lm_head", table, bias_V), tensors)
    open_graph(graph, [hidden, logits])
    assert (tmp_path / "model.onnx.data").stat().st_size <= written + (64 + 4 * VOCABULARY if bias else 0)

    x = np.random.default_rng(0).normal(size=(2, 3, width)).astype(np.float32)
    session = float32_session(tmp_path)
    (actual,) = session.run([logits], {"input_ids": IDS, "x": x})
    expected = x @ as_float(table).T + (0 if bias_V is None else bias_V.numpy())
    assert relative_error(actual, expected) < 2e-6


def test_a_blocked_table_is_seen_by_both_in_the_shape_that_each_kernel_wants(tmp_path: Path) -> None:
    graph, table = new_graph(tmp_path, 72), table_of("w4a16", 72)
    _, tensors = emit_embedding(graph, embedding(72), table)
    codes, rows = graph.tensors[tensors[0]], graph.tensors["embed.rows"]
    assert (list(codes.dims), list(rows.dims)) == ([VOCABULARY, 3, 16], [VOCABULARY, 48])
    assert codes.external_data == rows.external_data
    graph.data.close()


def test_a_row_that_does_not_fill_its_blocks_is_cut_off(tmp_path: Path) -> None:
    cut = []
    for width in (64, 72):
        folder = tmp_path / str(width)
        folder.mkdir()
        graph = new_graph(folder, width)
        emit_embedding(graph, embedding(width), table_of("w8a16", width))
        graph.save("0")
        nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
        cut.append([node.op_type for node in nodes])
    assert cut == [["Cast", "GatherBlockQuantized"], ["Cast", "GatherBlockQuantized", "Slice"]]
