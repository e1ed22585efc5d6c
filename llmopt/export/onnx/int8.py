"""Integers on both sides: activations with a range for each token, weights with a scale for each channel.

A row x of activations is rounded to x ≈ step (q + z) with codes q from 0 to 255 and an integer z, so that 0 is a point
of the grid: most activations are small, and off the grid they would all be wrong in the same direction. Then

    x Wᵀ  ≈  step (q Wᵀ + z Σ W)

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
# A row of zeros has a range of width 0; any positive step serves.
SMALLEST_STEP = np.float32(1e-30)


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
    x_codes, step, shift = int8_rows(graph, x)
    one, zero = graph.constant(np.float32(1)), graph.constant(np.uint8(0))
    inputs = [x_codes, codes, one, scales, zero, graph.constant(np.int8(0))]
    product = graph.node("MatMulIntegerToFloat", inputs, f"{name}/integers", domain=MICROSOFT)
    # z Σ W, an outer product, added in the same pass.
    shifted = graph.node("Gemm", [shift, sums, product], f"{name}/shifted")
    scaled = graph.node("Mul", [shifted, step], f"{name}/scaled")
    return graph.node("Reshape", [scaled, output_shape(graph, x, graph.tensors[codes].dims[1])], name)


def int8_rows(graph: Graph, x: str) -> tuple[str, str, str]:
    """q, uint8 [tokens of the batch, in]; step and z, float32 [tokens of the batch, 1]."""
    codes, step, shift = f"{x}/codes", f"{x}/step", f"{x}/shift"
    if codes not in graph.values:
        last, nothing = graph.constant(np.array([-1], np.int64)), graph.constant(np.float32(0))
        flat = graph.node("Flatten", [x], f"{x}/flat", axis=-1)
        low = graph.node("Min", [graph.node("ReduceMin", [flat, last], f"{x}/min", keepdims=0), nothing], f"{x}/low")
        high = graph.node("Max", [graph.node("ReduceMax", [flat, last], f"{x}/max", keepdims=0), nothing], f"{x}/high")
        width = graph.node("Sub", [high, low], f"{x}/width")
        fraction = graph.node("Mul", [width, graph.constant(np.float32(1 / TOP))], f"{x}/fraction")
        steps = graph.node("Max", [fraction, graph.constant(SMALLEST_STEP)], f"{x}/steps")
        shifts = graph.node("Round", [graph.node("Div", [low, steps], f"{x}/lowest")], f"{x}/shifts")
        zeros = graph.node("Neg", [shifts], f"{x}/zeros")
        zeros = graph.node("Cast", [zeros], f"{x}/zero_codes", to=TensorProto.UINT8)
        graph.node("QuantizeLinear", [flat, steps, zeros], f"{x}/quantize", outputs=[codes], axis=0)
        graph.node("Unsqueeze", [steps, last], f"{x}/step_column", outputs=[step])
        graph.node("Unsqueeze", [shifts, last], f"{x}/shift_column", outputs=[shift])
    return codes, step, shift


def output_shape(graph: Graph, x: str, channels: int) -> str:
    """[batch, tokens, channels], shared by all products of as many tokens and channels."""
    tokens = graph.tokens or f"{x}/tokens"
    if tokens not in graph.values:
        graph.node("Shape", [x], tokens, outputs=[tokens], end=-1)
    shape = f"{tokens}/{channels}"
    if shape not in graph.values:
        last = graph.constant(np.array([channels], np.int64))
        graph.node("Concat", [tokens, last], shape, outputs=[shape], axis=0)
    return shape
