"""The token table, and the head that shares its bytes when the two are tied."""

import numpy as np
from onnx import TensorProto
from torch import Tensor

from llmopt.export.onnx.graph import MICROSOFT, Graph
from llmopt.export.onnx.int8 import int8_product, write_columns
from llmopt.export.onnx.linear import Product, add_bias, chosen_kernel, float_scales, matmul_nbits, write_blocks
from llmopt.model.spec import Embedding
from llmopt.quantize.weights import QuantizedWeight


def emit_embedding(graph: Graph, embedding: Embedding, table: Tensor | QuantizedWeight) -> tuple[str, tuple[str, ...]]:
    """Look the tokens up; gives the hidden states [batch, tokens, width], and the tensors that a tied head reads."""
    if not isinstance(table, QuantizedWeight):
        name = graph.tensor(f"{embedding.name}.weight", table.numpy())
        return graph.node("Gather", [name, "input_ids"], embedding.name, axis=0), (name,)
    if table.scheme.activation_bits == 8:
        return gather_channels(graph, embedding, table)
    return gather_blocks(graph, embedding, table)


def gather_blocks(graph: Graph, embedding: Embedding, table: QuantizedWeight) -> tuple[str, tuple[str, ...]]:
    """Rows unpacked from the very bytes that MatMulNBits reads: [vocab, blocks, bytes] seen as [vocab, bytes]."""
    # In the blocks of the head, which reads the same bytes if the two are tied.
    size, (rows, columns) = chosen_kernel(graph, table, every_token=False).block_size, table.codes_OI.shape
    codes, scales, zeros = write_blocks(graph, embedding.name, table, size)
    blocks = -(-columns // size)
    flat = graph.alias(f"{embedding.name}.rows", codes, [rows, blocks * size * table.scheme.bits // 8])
    inputs = [flat, "input_ids", float_scales(graph, scales, embedding.name), *([zeros] if zeros else [])]
    hidden = graph.node(
        "GatherBlockQuantized",
        inputs,
        embedding.name,
        domain=MICROSOFT,
        bits=table.scheme.bits,
        block_size=size,
        gather_axis=0,
        quantize_axis=1,
    )
    if blocks * size > columns:
        bounds = [graph.constant(np.array([value], np.int64)) for value in (0, columns, -1)]
        hidden = graph.node("Slice", [hidden, *bounds], f"{embedding.name}/cut")
    return hidden, (codes, scales, zeros or "")


def gather_channels(graph: Graph, embedding: Embedding, table: QuantizedWeight) -> tuple[str, tuple[str, ...]]:
    """Columns of the codes [width, vocab] that the integer head multiplies by, turned and scaled."""
    tensors = write_columns(graph, embedding.name, table)
    codes, scales, _ = tensors
    columns = graph.node("Gather", [codes, "input_ids"], f"{embedding.name}/columns", axis=1)
    rows = graph.node("Transpose", [columns], f"{embedding.name}/rows", perm=[1, 2, 0])
    steps = graph.node("Gather", [scales, "input_ids"], f"{embedding.name}/steps", axis=0)
    steps = graph.node("Unsqueeze", [steps, graph.constant(np.array([-1], np.int64))], f"{embedding.name}/steps_column")
    values = graph.node("Cast", [rows], f"{embedding.name}/values", to=TensorProto.FLOAT)
    return graph.node("Mul", [values, steps], embedding.name), tensors


def emit_tied_head(graph: Graph, x: str, head: Product, tensors: tuple[str, ...]) -> str:
    """Logits from the bytes of the embedding, whose tensors these are."""
    if not isinstance(head.weight, QuantizedWeight):
        logits = graph.node("FusedMatMul", [x, *tensors], head.name, domain=MICROSOFT, transB=1)
        return add_bias(graph, logits, head)
    if head.weight.scheme.activation_bits == 8:
        return add_bias(graph, int8_product(graph, x, head.name, tensors), head)
    codes, scales, zeros = tensors
    return matmul_nbits(graph, x, head, head.weight, (codes, scales, zeros))
