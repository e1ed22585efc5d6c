"""The same graph computed in float32: what remains when no kernel rounds activations, for holding it against torch."""

import onnx
from onnx import ModelProto, NodeProto, helper

from llmopt.export.onnx.one_token import without_short_ways


def in_float32(model: ModelProto, *, integers: bool = False) -> ModelProto:
    """Rewrite a graph, in place, to what it would compute with activations in float32, over the same data file.

    MatMulNBits goes to accuracy level 0. Unless `integers` stay, an integer product becomes a float one of the same
    codes, and the codes of its activations the values that they are rounded from.
    """
    model = without_short_ways(model)
    nodes = [replacement for node in model.graph.node for replacement in _in_float32(node, integers=integers)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _in_float32(node: NodeProto, *, integers: bool) -> list[NodeProto]:
    match node.op_type:
        case "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
            return [node]
        case "QuantizeLinear" if not integers and node.output[0].endswith("/codes"):
            return _unrounded(node)
        case "MatMulIntegerToFloat" if not integers:
            return _float_product(node)
    return [node]


def _unrounded(node: NodeProto) -> list[NodeProto]:
    """x / step + zero without rounding; both lie beside the codes as columns."""
    of_codes = node.output[0].removesuffix("/codes")
    return [
        helper.make_node("Div", [node.input[0], f"{of_codes}/step"], [f"{of_codes}/in_steps"]),
        helper.make_node("Add", [f"{of_codes}/in_steps", f"{of_codes}/zero"], node.output, name=node.name),
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
