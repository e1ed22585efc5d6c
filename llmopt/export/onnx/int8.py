"""Integers on both sides: activations with a range for each token, weights with a scale for each channel.

A row x of activations is rounded to x ≈ step (q - z) with codes q and z from 0 to 255, so that 0 is a point of the
grid: most activations are small, and off the grid they would all be wrong in the same direction. Then

    x Wᵀ  ≈  step (q Wᵀ - z Σ W)

where the integer kernel computes q Wᵀ, and Σ W, the sum of each row of W, is known beforehand. `DynamicQuantizeMatMul`
is the same kernel, but takes one range from the whole batch: there a token's result depends on its neighbours, and an
outlier in one costs all of them their precision. A range symmetric around zero would save the sum; rows with outliers
on one side, which are the ones that lose most, would have half the codes.
"""

import numpy as np
from onnx import TensorProto

from llmopt.export.onnx.graph import MICROSOFT, Graph
from llmopt.quantize.int8 import CENTER, sums_fit
from llmopt.quantize.weights import QuantizedWeight

TOP = 255
SMALLEST_TOP = np.float32(1e-28)  # of a range: a row of zeros has a step as well


def write_columns(graph: Graph, name: str, weight: QuantizedWeight) -> tuple[str, str, str]:
    """Write an 8-bit weight as int8 codes [in, out], float32 scales [out] and sums [1, out]; gives their names."""
    assert sums_fit(weight.codes_OI), f"{name}: the products of neighbouring channels would saturate"
    codes_OI = (weight.codes_OI.numpy().astype(np.int16) - CENTER).astype(np.int8)
    scales_O = weight.scales_OG[:, 0].numpy()
    sums_O = codes_OI.sum(axis=1, dtype=np.int64) * scales_O.astype(np.float64)
    return (
        graph.tensor(f"{name}.codes", np.ascontiguousarray(codes_OI.T)),
        graph.tensor(f"{name}.scales", scales_O),
        graph.tensor(f"{name}.sums", sums_O.astype(np.float32)[None]),
    )


def int8_product(graph: Graph, x: str, name: str, tensors: tuple[str, ...]) -> str:
    """The nodes of one product over tensors that are written already; products of one x share its codes."""
    codes, scales, sums = tensors
    x_codes, step, zero = int8_rows(graph, x)
    one, nothing = graph.constant(np.float32(1)), graph.constant(np.uint8(0))
    inputs = [x_codes, codes, one, scales, nothing, graph.constant(np.int8(0))]
    product = graph.node("MatMulIntegerToFloat", inputs, f"{name}/integers", domain=MICROSOFT)
    # z Σ W, an outer product, taken off in the same pass.
    shifted = graph.node("Gemm", [zero, sums, product], f"{name}/shifted", alpha=-1.0)
    # What is given back is computed, not reshaped: a branch would copy a view of something else to make it its output.
    shaped = graph.node("Reshape", [shifted, output_shape(graph, x, graph.tensors[codes].dims[1])], f"{name}/shaped")
    return graph.node("Mul", [shaped, steps_of_tokens(graph, x, step)], name)


def int8_rows(graph: Graph, x: str) -> tuple[str, str, str]:
    """q, uint8 [tokens of the batch, in]; step and z, float32 [tokens of the batch, 1].

    A deep model has thousands of these, and each node costs time in decoding: there are no more than there must be.
    """
    codes, step, zero = f"{x}/codes", f"{x}/step", f"{x}/zero"
    if codes not in graph.values:
        last = graph.constant(np.array([-1], np.int64))
        flat = graph.node("Flatten", [x], f"{x}/flat", axis=-1)
        low = graph.node("ReduceMin", [flat, last], f"{x}/min", keepdims=1)
        low = graph.node("Min", [low, graph.constant(np.float32(0))], f"{x}/low")
        high = graph.node("ReduceMax", [flat, last], f"{x}/max", keepdims=1)
        high = graph.node("Max", [high, graph.constant(SMALLEST_TOP)], f"{x}/high")
        fall = graph.node("Sub", [low, high], f"{x}/fall")
        graph.node("Mul", [fall, graph.constant(np.float32(-1 / TOP))], f"{x}/steps", outputs=[step])
        share = graph.node("Div", [low, fall], f"{x}/share")
        share_of_code = [graph.constant(np.float32(1 / TOP)), graph.constant(np.uint8(0))]
        zero_code = graph.node("QuantizeLinear", [share, *share_of_code], f"{x}/zero_code")
        graph.node("Cast", [zero_code], f"{x}/zeros", outputs=[zero], to=TensorProto.FLOAT)
        of_tokens = [graph.node("Squeeze", [column, last], f"{column}/of_tokens") for column in (step, zero_code)]
        graph.node("QuantizeLinear", [flat, *of_tokens], f"{x}/quantize", outputs=[codes], axis=0)
    return codes, step, zero


def steps_of_tokens(graph: Graph, x: str, step: str) -> str:
    """The steps as [batch, tokens, 1]."""
    name = f"{step}/of_batch"
    if name not in graph.values:
        graph.node("Reshape", [step, output_shape(graph, x, 1)], name, outputs=[name])
    return name


def output_shape(graph: Graph, x: str, channels: int) -> str:
    """[batch, tokens, channels], shared by all products of as many tokens and channels."""
    like = graph.like or x
    tokens = f"{like}/tokens"
    if tokens not in graph.values:
        graph.node("Shape", [like], tokens, outputs=[tokens], end=2)
    shape = f"{tokens}/{channels}"
    if shape not in graph.values:
        last = graph.constant(np.array([channels], np.int64))
        graph.node("Concat", [tokens, last], shape, outputs=[shape], axis=0)
    return shape
