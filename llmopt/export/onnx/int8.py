"""Integers on both sides: activations with a range for each token, weights with a scale for each channel.

A row x of activations becomes codes q = round(255 (x - low) / width) of its own range, and

    x Wᵀ  ≈  width (q / 255) Wᵀ + low Σ W

where the integer kernel computes (q / 255) Wᵀ with one constant scale for every token, and Σ W, the sum of each row of
W, is known beforehand. `DynamicQuantizeMatMul` is the same kernel, but takes one range from the whole batch: there a
token's result depends on its neighbours, and an outlier in one costs all of them their precision. A range around zero
would save the sum; rows with outliers on one side, which are the ones that lose most, would have half the codes.
"""

import numpy as np

from llmopt.export.onnx.graph import MICROSOFT, Graph
from llmopt.quantize.weights import QuantizedWeight

CENTER = 128
TOP = 255
# The width of a row whose values are all equal is 0; any positive one serves.
SMALLEST_WIDTH = np.float32(1e-30)


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
    x_codes, low, width = int8_rows(graph, x)
    step, zero = graph.constant(np.float32(1 / TOP)), graph.constant(np.uint8(0))
    inputs = [x_codes, codes, step, scales, zero, code_of_zero(graph)]
    product = graph.node("MatMulIntegerToFloat", inputs, f"{name}/integers", domain=MICROSOFT)
    scaled = graph.node("Mul", [product, width], f"{name}/scaled")
    return graph.node("Add", [scaled, graph.node("Mul", [low, sums], f"{name}/shift")], name)


def int8_rows(graph: Graph, x: str) -> tuple[str, str, str]:
    """Codes of x, uint8, and each row's lowest value and width, [batch, tokens, 1]."""
    codes, low, width = f"{x}/codes", f"{x}/low", f"{x}/width"
    if codes not in graph.values:
        last = graph.constant(np.array([-1], np.int64))
        graph.node("ReduceMin", [x, last], f"{x}/min", outputs=[low], keepdims=1)
        high = graph.node("ReduceMax", [x, last], f"{x}/max", keepdims=1)
        difference = graph.node("Sub", [high, low], f"{x}/difference")
        graph.node("Max", [difference, graph.constant(SMALLEST_WIDTH)], f"{x}/positive", outputs=[width])
        shifted = graph.node("Sub", [x, low], f"{x}/shifted")
        unit = graph.node("Div", [shifted, width], f"{x}/unit")
        step, zero = graph.constant(np.float32(1 / TOP)), graph.constant(np.uint8(0))
        graph.node("QuantizeLinear", [unit, step, zero], f"{x}/quantize", outputs=[codes])
    return codes, low, width
