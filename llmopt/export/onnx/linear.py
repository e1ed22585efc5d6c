"""How a linear becomes nodes: float, weight-only integers, or integers on both sides."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from llmopt.export.onnx.graph import MICROSOFT, Graph
from llmopt.export.onnx.int8 import int8_product, write_columns
from llmopt.export.onnx.kernels import Kernel, Shape
from llmopt.quantize.pack import block_scales, block_zero_points, pack_codes
from llmopt.quantize.weights import QuantizedWeight, stack_rows


@dataclass(frozen=True, slots=True)
class Product:
    """y = x Wᵀ + b with its weight as found: float [out, in], or quantized.

    It is computed in the dtype of a float weight, float32 or float16, which its bias has too.

    `every_token` says whether x is all of a prompt, or its last token alone.
    """

    name: str
    weight: Tensor | QuantizedWeight
    bias: Tensor | None = None
    every_token: bool = True


def stacked(name: str, products: Sequence[Product]) -> Product | None:
    """Products of one input as a single one, if they are of one kind; else None."""
    biases = [product.bias for product in products]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        return None
    bias = torch.cat([bias for bias in biases if bias is not None]) if biases[0] is not None else None
    quantized = [product.weight for product in products if isinstance(product.weight, QuantizedWeight)]
    if not quantized:
        return Product(name, torch.cat([product.weight for product in products]), bias)  # type: ignore[misc]
    if len(quantized) < len(products) or len({weight.scheme for weight in quantized}) > 1:
        return None
    return Product(name, stack_rows(quantized), bias)


def emit_together(graph: Graph, x: str, name: str, products: Sequence[Product]) -> str:
    """Products of one input with their outputs side by side: one node where their schemes agree."""
    whole = stacked(name, products)
    if whole is not None:
        return emit(graph, x, whole)
    parts = [emit(graph, x, product) for product in products]
    return graph.node("Concat", parts, f"{name}/concat", axis=-1)


def emit_apart(graph: Graph, x: str, name: str, products: Sequence[Product]) -> list[str]:
    """Products of one input, each with an output of its own.

    Weight-only ones of one scheme, all of one size, are one node, whose result is split: for a token alone that reads
    more behind one another, which takes less time than two nodes do. For integers the split costs more than it gains.
    """
    whole = stacked(name, products) if len(products) > 1 else None
    weight = None if whole is None else whole.weight
    if whole is None or not isinstance(weight, QuantizedWeight) or weight.scheme.activation_bits == 8:
        return [emit(graph, x, product) for product in products]
    outputs = [f"{product.name}/output" for product in products]
    together = emit(graph, x, whole)
    graph.node("Split", [together], f"{name}/split", outputs=outputs, axis=-1, num_outputs=len(outputs))
    return outputs


def emit(graph: Graph, x: str, product: Product) -> str:
    """Write one product's tensors and nodes; gives the name of y."""
    if not isinstance(product.weight, QuantizedWeight):
        weight = graph.tensor(f"{product.name}.weight", product.weight.T.contiguous().numpy())
        x = graph.cast(x, half=weight in graph.half)
        return add_bias(graph, graph.node("MatMul", [x, weight], product.name), product)
    if product.weight.scheme.activation_bits == 8:
        codes = write_columns(graph, product.name, product.weight)
        return add_bias(graph, int8_product(graph, x, product.name, codes), product)
    return emit_blocks(graph, x, product, product.weight)


def add_bias(graph: Graph, y: str, product: Product) -> str:
    """Y + b where there is a bias."""
    if product.bias is None:
        return y
    return graph.node("Add", [y, graph.tensor(f"{product.name}.bias", product.bias.numpy())], f"{product.name}/bias")


def write_blocks(graph: Graph, name: str, weight: QuantizedWeight, size: int) -> tuple[str, str, str | None]:
    """Write the codes, scales and zero points of a weight in blocks of `size`; gives their names.

    Scales that lose nothing by it are stored in half precision: the rest would be half a bit a weight in groups of 32.
    """
    scales, zeros = block_scales(weight, size), block_zero_points(weight, size)
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    return (
        graph.tensor(f"{name}.codes", pack_codes(weight, size)),
        graph.tensor(f"{name}.scales", half if np.array_equal(half, scales) else scales),
        None if zeros is None else graph.tensor(f"{name}.zero_points", zeros),
    )


def float_scales(graph: Graph, scales: str, reader: str) -> str:
    """Scales as kernels of float32 activations read them; onnxruntime converts them once, when it opens the graph."""
    if graph.tensors[scales].data_type == TensorProto.FLOAT:
        return scales
    return graph.node("Cast", [scales], f"{reader}/scales", to=TensorProto.FLOAT)


def emit_blocks(graph: Graph, x: str, product: Product, weight: QuantizedWeight) -> str:
    """MatMulNBits: weights unpacked block by block inside the kernel."""
    kernel = chosen_kernel(graph, weight, every_token=product.every_token)
    codes, scales, zeros = write_blocks(graph, product.name, weight, kernel.block_size)
    return matmul_nbits(graph, x, product, weight, (codes, scales, zeros or ""))


def chosen_kernel(graph: Graph, weight: QuantizedWeight, *, every_token: bool) -> Kernel:
    """The kernel of a weight-only product."""
    return graph.choose(Shape.of(weight, every_token=every_token))


def matmul_nbits(graph: Graph, x: str, product: Product, weight: QuantizedWeight, tensors: tuple[str, str, str]) -> str:
    """The node alone, over tensors that are written already."""
    kernel = chosen_kernel(graph, weight, every_token=product.every_token)
    codes, scales, zeros = tensors
    inputs = [x, codes, float_scales(graph, scales, product.name), zeros]
    if product.bias is not None:
        # Inputs: A, B, scales, zero_points, g_idx, bias. g_idx would send the kernel to its slow path.
        inputs += ["", graph.tensor(f"{product.name}.bias", product.bias.numpy())]
    while not inputs[-1]:
        inputs.pop()
    rows, columns = weight.codes_OI.shape
    return graph.node(
        "MatMulNBits",
        inputs,
        product.name,
        domain=MICROSOFT,
        K=columns,
        N=rows,
        bits=weight.scheme.bits,
        block_size=kernel.block_size,
        accuracy_level=kernel.accuracy_level,
    )
