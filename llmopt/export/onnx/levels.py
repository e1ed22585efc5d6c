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
            return [helper.make_node("Identity", node.input[:1], node.output, name=node.name)]
        case "MatMulIntegerToFloat" if not integers:
            return _float_product(node)
    return [node]


def _float_product(node: NodeProto) -> list[NodeProto]:
    """x (codes - zero) times the scales. As DequantizeLinear, onnxruntime would make an int8 product of it again."""
    x, codes, _, scales, _, zero = node.input
    name = node.name
    return [
        helper.make_node("Cast", [codes], [f"{name}/codes"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Cast", [zero], [f"{name}/zero"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Sub", [f"{name}/codes", f"{name}/zero"], [f"{name}/centered"]),
        helper.make_node("MatMul", [x, f"{name}/centered"], [f"{name}/unscaled"]),
        helper.make_node("Mul", [f"{name}/unscaled", scales], node.output, name=name),
    ]
