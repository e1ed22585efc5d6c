"""What rounding activations to int8 costs each weight-only product, and products that do not round them."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from llmopt.export.onnx.graph import MICROSOFT
from llmopt.export.onnx.kernels import FLOAT32, INT8

ERRORS = "rounding_errors"
_PREFIX = "rounding"
_LEVEL = "accuracy_level"
_SMALLEST = np.float32(1e-30)  # change from one token to the next, for tokens that are the same


def rounding_products(model: ModelProto) -> list[str]:
    """The products that round their activations, by the names of their nodes."""
    products = (node for node in model.graph.node if node.op_type == "MatMulNBits")
    return [node.name for node in products if _attribute(node, _LEVEL) == INT8]


def with_errors(model: ModelProto, names: Collection[str]) -> ModelProto:
    """Add an output to a graph in float32, in place: `ERRORS`, float32 [products, tokens - 1].

    Each is the norm of what rounding the activations changes in a token's result, over the norm of what differs in it
    from the token before, divided by √2: what all tokens share, often by far the most, tells none of them apart.
    """
    ratios = []
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        if node.name in names:
            ratios.append(f"{node.name}/ratio")
            nodes += _error(node)
    nodes.append(helper.make_node("Concat", ratios, [ERRORS], axis=0))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _add(model, "first", np.array([0], np.int64))
    _add(model, "second", np.array([1], np.int64))
    _add(model, "end", np.array([np.iinfo(np.int64).max], np.int64))
    _add(model, "last", np.array([-1], np.int64))
    _add(model, "half", np.float32(0.5**0.5))
    _add(model, "smallest", _SMALLEST)
    return model


def _error(node: NodeProto) -> list[NodeProto]:
    name, exact = node.name, node.output[0]
    first, second, end, last = (f"{_PREFIX}/{word}" for word in ("first", "second", "end", "last"))
    twin = NodeProto()
    twin.CopyFrom(node)
    twin.name, twin.output[0] = f"{name}/rounded", f"{name}/rounded"
    _set_level(twin, INT8)
    return [
        twin,
        helper.make_node("Slice", [twin.output[0], second, end, second], [f"{name}/actual"]),
        helper.make_node("Slice", [exact, second, end, second], [f"{name}/expected"]),
        helper.make_node("Slice", [exact, first, last, second], [f"{name}/before"]),
        helper.make_node("Sub", [f"{name}/actual", f"{name}/expected"], [f"{name}/error"]),
        helper.make_node("Sub", [f"{name}/expected", f"{name}/before"], [f"{name}/change"]),
        helper.make_node("ReduceL2", [f"{name}/error", last], [f"{name}/error_norm"], keepdims=0),
        helper.make_node("ReduceL2", [f"{name}/change", last], [f"{name}/change_norm"], keepdims=0),
        helper.make_node("Mul", [f"{name}/change_norm", f"{_PREFIX}/half"], [f"{name}/size"]),
        helper.make_node("Max", [f"{name}/size", f"{_PREFIX}/smallest"], [f"{name}/divisor"]),
        helper.make_node("Div", [f"{name}/error_norm", f"{name}/divisor"], [f"{name}/ratio"]),
    ]


def unround(model: ModelProto, names: Collection[str]) -> ModelProto:
    """Give products, in place, another kernel that multiplies activations as they are, over the same bytes.

    At 8 bits accuracy level 0 unpacks the whole weight in every call, and decodes a hundred times slower: there
    onnxruntime is made to unpack it once, when it opens the graph, for four times the memory.
    """
    nodes = []
    for node in model.graph.node:
        if node.name not in names:
            nodes.append(node)
        elif _attribute(node, "bits") == 8:
            nodes += _unpacked(model, node)
        else:
            _set_level(node, FLOAT32)
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _unpacked(model: ModelProto, node: NodeProto) -> list[NodeProto]:
    """(codes - zero points) times scales, [rows, blocks, block], as a matrix: constants, which onnxruntime folds."""
    name = node.name
    x, codes, scales, *optional = node.input
    zeros, _, bias = [*optional, "", "", ""][:3]
    rows, columns = _attribute(node, "N"), _attribute(node, "K")
    last = _add(model, "last", np.array([-1], np.int64))
    found = [helper.make_node("Cast", [codes], [f"{name}/codes"], to=TensorProto.FLOAT)]
    zero = _add(model, "center", np.float32(128))
    if zeros:
        zero = f"{name}/zeros"
        found += [
            helper.make_node("Cast", [zeros], [f"{name}/zero_row"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", [f"{name}/zero_row", last], [zero]),
        ]
    flat = _add(model, f"flat/{rows}", np.array([rows, -1], np.int64))
    bounds = [_add(model, f"{place}", np.array([place], np.int64)) for place in (0, columns)]
    found += [
        helper.make_node("Sub", [f"{name}/codes", zero], [f"{name}/steps"]),
        helper.make_node("Unsqueeze", [scales, last], [f"{name}/scale_column"]),
        helper.make_node("Mul", [f"{name}/steps", f"{name}/scale_column"], [f"{name}/blocks"]),
        helper.make_node("Reshape", [f"{name}/blocks", flat], [f"{name}/padded"]),
        helper.make_node("Slice", [f"{name}/padded", *bounds, last], [f"{name}/rows"]),
    ]
    product = node.output[0] if not bias else f"{name}/unbiased"
    found.append(helper.make_node("FusedMatMul", [x, f"{name}/rows"], [product], name=name, domain=MICROSOFT, transB=1))
    if bias:
        found.append(helper.make_node("Add", [product, bias], node.output, name=f"{name}/bias"))
    return found


def _attribute(node: NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def _set_level(node: NodeProto, level: int) -> None:
    for attribute in node.attribute:
        if attribute.name == _LEVEL:
            attribute.i = level


def _add(model: ModelProto, word: str, value: NDArray[np.generic] | np.generic) -> str:
    """A constant, which is added once."""
    name = f"{_PREFIX}/{word}"
    if all(tensor.name != name for tensor in model.graph.initializer):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name
