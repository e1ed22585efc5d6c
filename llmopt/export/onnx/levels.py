"""The same graph computed in float32: what remains when no kernel rounds activations, for holding it against torch."""

from pathlib import Path

import onnx
from onnx import NodeProto, helper

from llmopt.export.onnx.graph import GRAPH_FILE


def in_float32(folder: Path, name: str, *, integers: bool = False) -> Path:
    """Write `name` beside the graph: the same graph over the same data file with activations in float32.

    MatMulNBits goes to accuracy level 0. Unless `integers` stay, an integer product becomes a float one of the same
    codes, and the codes of its activations the values that they are rounded from.
    """
    model = onnx.load(folder / GRAPH_FILE, load_external_data=False)
    nodes = [replacement for node in model.graph.node for replacement in _in_float32(node, integers=integers)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path = folder / name
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def _in_float32(node: NodeProto, *, integers: bool) -> list[NodeProto]:
    match node.op_type:
        case "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
            return [node]
        case "QuantizeLinear" if not integers:
            return _unrounded(node)
        case "MatMulIntegerToFloat" if not integers:
            return _float_product(node)
    return [node]


def _unrounded(node: NodeProto) -> list[NodeProto]:
    """x / step + zero, both [tokens], without rounding."""
    x, step, zero = node.input
    name = node.name
    return [
        helper.make_node("Cast", [zero], [f"{name}/zeros"], to=onnx.TensorProto.FLOAT),
        # Tokens last: [tokens] then stands beside [in, tokens].
        helper.make_node("Transpose", [x], [f"{name}/turned"], perm=[1, 0]),
        helper.make_node("Div", [f"{name}/turned", step], [f"{name}/scaled"]),
        helper.make_node("Add", [f"{name}/scaled", f"{name}/zeros"], [f"{name}/shifted"]),
        helper.make_node("Transpose", [f"{name}/shifted"], node.output, name=name, perm=[1, 0]),
    ]


def _float_product(node: NodeProto) -> list[NodeProto]:
    """x codes times the scales. As DequantizeLinear, onnxruntime would make an int8 product of it again."""
    x, codes, _, scales, _, _ = node.input
    name = node.name
    return [
        helper.make_node("Cast", [codes], [f"{name}/codes"], to=onnx.TensorProto.FLOAT),
        helper.make_node("MatMul", [x, f"{name}/codes"], [f"{name}/unscaled"]),
        helper.make_node("Mul", [f"{name}/unscaled", scales], node.output, name=name),
    ]
