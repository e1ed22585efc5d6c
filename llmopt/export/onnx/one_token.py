"""A short way through integer products for one token alone, as in decoding.

A range for each token takes seventeen nodes a product, which in decoding cost more time than a small product itself. Of
one token the range of the whole batch is its own, and `DynamicQuantizeMatMul` does all of it in one node; the `If` that
chooses costs as much as two. onnxruntime then keeps a weight twice, in the order of each of the two kernels: so groups
that are large, where reading the weights takes far longer than their nodes, have the long way only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from llmopt.export.onnx.graph import MICROSOFT, Graph

LARGEST_BYTES = 1 << 22  # of the weights of a group: they are read in 0.3 ms or so
_PRODUCT = "/integers"
_ALONE, _EACH = "/alone", "/each"  # what the branches call the outputs


@dataclass(slots=True)
class _Group:
    """The products of one input: their nodes in the graph, in order."""

    x: str
    integers: list[NodeProto] = field(default_factory=list)
    nodes: list[NodeProto] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [node.name.removesuffix(_PRODUCT) for node in self.integers]

    @property
    def outputs(self) -> list[str]:
        return [f"{name}/output" for name in self.names]


def add_short_ways(graph: Graph) -> None:
    """Put each small group of integer products into an `If`: one node each for a token alone, else those there are."""
    groups = [group for group in _groups(graph.nodes) if _weight_bytes(graph, group) <= LARGEST_BYTES]
    if not groups:
        return
    group_of = {node.name: group for group in groups for node in group.nodes}
    last_of = {group.nodes[-1].name: group for group in groups}
    conditions: dict[str, list[NodeProto]] = {}
    ordered: list[NodeProto] = []
    waiting: list[NodeProto] = []  # nodes that read a group which is not complete
    unknown: set[str] = set()
    for node in graph.nodes:
        if node.name not in group_of:
            waits = not unknown.isdisjoint(node.input)
            unknown.update(node.output if waits else ())
            (waiting if waits else ordered).append(node)
            continue
        unknown.update(group_of[node.name].outputs)
        if group := last_of.get(node.name):
            tokens = _shape_of_tokens(group)
            if tokens not in conditions:
                conditions[tokens] = _is_one(graph, tokens)
                ordered += conditions[tokens]
            ordered += [_either(group, conditions[tokens][-1].output[0]), *waiting]
            waiting, unknown = [], set()
    _replace(graph.model.graph, ordered)


def without_short_ways(model: ModelProto) -> ModelProto:
    """The same graph, in place, with the long way alone, whose nodes are those of the main graph again."""
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "If":
            nodes.append(node)
            continue
        long = next(item.g for item in node.attribute if item.name == "else_branch")
        for inner in long.node:
            renamed = NodeProto()
            renamed.CopyFrom(inner)
            renamed.output[0] = inner.output[0].removesuffix(_EACH)
            nodes.append(renamed)
    _replace(model.graph, nodes)
    return model


def _groups(nodes: Iterable[NodeProto]) -> list[_Group]:
    nodes = list(nodes)
    made_by = {name: node for node in nodes for name in node.output}
    place = {node.name: index for index, node in enumerate(nodes)}
    groups: dict[str, _Group] = {}
    for node in nodes:
        if node.op_type == "MatMulIntegerToFloat":
            x = node.input[0].removesuffix("/codes")
            groups.setdefault(x, _Group(x)).integers.append(node)
    for group in groups.values():
        ends = [made_by[output] for output in group.outputs]
        names = {found.name for end in ends for found in _behind(end, group.x, made_by)}
        group.nodes = [nodes[index] for index in sorted(place[name] for name in names)]
    return list(groups.values())


def _behind(end: NodeProto, x: str, made_by: dict[str, NodeProto]) -> list[NodeProto]:
    """All nodes between x and the one that ends a product, but not those that find its shape."""
    found: list[NodeProto] = []
    todo = [end]
    while todo:
        node = todo.pop()
        found.append(node)
        read = node.input[:1] if node.op_type == "Reshape" else node.input
        todo += [made_by[name] for name in read if name != x and name in made_by]
    return found


def _shape_of_tokens(group: _Group) -> str:
    """The value [batch, tokens] that shapes in the group are made of."""
    shape: str = next(node.input[1] for node in group.nodes if node.op_type == "Reshape")
    return shape.rpartition("/")[0]


def _weight_bytes(graph: Graph, group: _Group) -> int:
    return sum(int(np.prod(graph.tensors[node.input[1]].dims)) for node in group.integers)


def _is_one(graph: Graph, tokens: str) -> list[NodeProto]:
    """Whether [batch, tokens] is one token in all."""
    one = graph.constant(np.int64(1))
    return [
        helper.make_node("ReduceProd", [tokens], [f"{tokens}/all"], name=f"{tokens}/all", keepdims=0),
        helper.make_node("Equal", [f"{tokens}/all", one], [f"{tokens}/alone"], name=f"{tokens}/alone"),
    ]


def _either(group: _Group, condition: str) -> NodeProto:
    alone = [
        helper.make_node(
            "DynamicQuantizeMatMul",
            [group.x, node.input[1], node.input[3]],
            [f"{output}{_ALONE}"],
            name=f"{name}{_ALONE}",
            domain=MICROSOFT,
        )
        for name, output, node in zip(group.names, group.outputs, group.integers, strict=True)
    ]
    each = []
    for node in group.nodes:
        renamed = NodeProto()
        renamed.CopyFrom(node)
        if node.output[0] in group.outputs:
            renamed.output[0] = f"{node.output[0]}{_EACH}"
        each.append(renamed)
    return helper.make_node(
        "If",
        [condition],
        group.outputs,
        name=f"{group.x}/products",
        then_branch=_branch(alone, f"{group.x}{_ALONE}", [f"{output}{_ALONE}" for output in group.outputs]),
        else_branch=_branch(each, f"{group.x}{_EACH}", [f"{output}{_EACH}" for output in group.outputs]),
    )


def _branch(nodes: Sequence[NodeProto], name: str, outputs: Sequence[str]) -> GraphProto:
    return helper.make_graph(
        nodes, name, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs]
    )


def _replace(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)
