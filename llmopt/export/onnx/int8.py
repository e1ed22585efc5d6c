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

from llmopt.export.onnx.graph import MICROSOFT, Graph
from llmopt.quantize.weights import QuantizedWeight

CENTER = 128
TOP = 255
# A row of zeros has a range of width 0; any positive step serves.
SMALLEST_STEP = np.float32(1e-30)


def write_columns(graph: Graph, name: str, weight: QuantizedWeight) -> tuple[str, str, str]:
    """Write an 8-bit weight as codes [in, out], scales [out] and sums [out]; gives their names.

    Codes are int8, or uint8 around 128 if the graph must run on CPUs that would saturate (see `Graph`).
    """
    centered_OI = weight.codes_OI.numpy().astype(np.int16) - CENTER
    scales_O = weight.scales_OG[:, 0].numpy()
    sums_O = centered_OI.sum(axis=1, dtype=np.int64) * scales_O.astype(np.float64)
    codes_OI = centered_OI.astype(np.int8) if graph.signed_int8 else weight.codes_OI.numpy()
    return (
        graph.tensor(f"{name}.codes", np.ascontiguousarray(codes_OI.T)),
        graph.tensor(f"{name}.scales", scales_O),
        graph.tensor(f"{name}.sums", sums_O.astype(np.float32)),
    )


def code_of_zero(graph: Graph) -> str:
    """What stands for 0 in the codes of a weight."""
    return graph.constant(np.int8(0) if graph.signed_int8 else np.uint8(CENTER))


def int8_product(graph: Graph, x: str, name: str, tensors: tuple[str, ...]) -> str:
    """The nodes of one product over tensors that are written already; products of one x share its codes."""
    codes, scales, sums = tensors
    x_codes, step, shift = int8_rows(graph, x)
    one, zero = graph.constant(np.float32(1)), graph.constant(np.uint8(0))
    inputs = [x_codes, codes, one, scales, zero, code_of_zero(graph)]
    product = graph.node("MatMulIntegerToFloat", inputs, f"{name}/integers", domain=MICROSOFT)
    shifted = graph.node("Add", [product, graph.node("Mul", [shift, sums], f"{name}/shift")], f"{name}/shifted")
    return graph.node("Mul", [shifted, step], name)


def int8_rows(graph: Graph, x: str) -> tuple[str, str, str]:
    """q, uint8, of the shape of x; step and z, float32 [batch, tokens, 1]."""
    codes, step, shift = f"{x}/codes", f"{x}/step", f"{x}/shift"
    if codes not in graph.values:
        last, nothing = graph.constant(np.array([-1], np.int64)), graph.constant(np.float32(0))
        low = graph.node("ReduceMin", [x, last], f"{x}/min", keepdims=1)
        high = graph.node("ReduceMax", [x, last], f"{x}/max", keepdims=1)
        low = graph.node("Min", [low, nothing], f"{x}/low")
        high = graph.node("Max", [high, nothing], f"{x}/high")
        width = graph.node("Sub", [high, low], f"{x}/width")
        fraction = graph.node("Mul", [width, graph.constant(np.float32(1 / TOP))], f"{x}/fraction")
        graph.node("Max", [fraction, graph.constant(SMALLEST_STEP)], f"{x}/positive", outputs=[step])
        lowest = graph.node("Div", [low, step], f"{x}/lowest")
        graph.node("Round", [lowest], f"{x}/round", outputs=[shift])
        steps = graph.node("Div", [x, step], f"{x}/steps")
        from_lowest = graph.node("Sub", [steps, shift], f"{x}/from_lowest")
        one, zero = graph.constant(np.float32(1)), graph.constant(np.uint8(0))
        graph.node("QuantizeLinear", [from_lowest, one, zero], f"{x}/quantize", outputs=[codes])
    return codes, step, shift
