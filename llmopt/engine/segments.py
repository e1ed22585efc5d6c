"""A graph run a few nodes at a time: no more of it is open, or computed before it is needed, than one segment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from llmopt.engine.ort import open_session

Values = dict[str, NDArray[Any]]
SEGMENT_NODES = 128


def run_in_segments(
    model: ModelProto,
    folder: Path,
    feeds: Sequence[Mapping[str, NDArray[Any]]],
    output: str,
    threads: int,
    *,
    segment_nodes: int = SEGMENT_NODES,
) -> list[NDArray[np.float32]]:
    """Run a graph whose nodes are in order and whose data lies in `folder`; gives one output for each feed.

    Each segment runs on all feeds before the next is opened. What later ones read is kept until the last of them has.
    What is computed from tensors alone is in every segment that reads it, a constant there too: MatMulNBits packs its
    scales together with the weight when a graph is opened, and some of its kernels compute nonsense from others.
    """
    constants = constant_nodes(model)
    nodes = [node for node in model.graph.node if node.output[0] not in constants]
    last_use = {name: place for place, node in enumerate(nodes) for name in node.input if name}
    last_use[output] = len(nodes)
    kept: list[Values] = [dict(feed) for feed in feeds]
    for start in range(0, len(nodes), segment_nodes):
        stop = min(start + segment_nodes, len(nodes))
        outputs = [name for node in nodes[start:stop] for name in node.output if last_use.get(name, -1) >= stop]
        if not outputs:  # what only other engines read
            continue
        part = segment(model, nodes[start:stop], constants, kept[0], outputs)
        session = open_session(part.SerializeToString(), folder, threads)
        inputs = [value.name for value in part.graph.input]
        for values in kept:
            # Copied, for in its output lives all the memory that a session has: 2 MB for one number.
            found = map(np.copy, session.run(outputs, {name: values[name] for name in inputs}))
            values.update(zip(outputs, found, strict=True))
            for name in [name for name in values if last_use.get(name, -1) < stop]:
                del values[name]
    return [values[output] for values in kept]


def constant_nodes(model: ModelProto) -> dict[str, NodeProto]:
    """The nodes that read tensors of the model and nothing else, by their output."""
    tensors = {tensor.name for tensor in model.graph.initializer}
    return {
        node.output[0]: node
        for node in model.graph.node
        if len(node.output) == 1 and node.input and all(name in tensors for name in node.input)
    }


def segment(
    model: ModelProto,
    nodes: Sequence[NodeProto],
    constants: Mapping[str, NodeProto],
    known: Values,
    outputs: Sequence[str],
) -> ModelProto:
    """Some nodes as a graph of their own, with the constants that they need; it reads what is `known` already."""
    needed = dict.fromkeys(name for node in nodes for name in node.input if name in constants)
    nodes = [*(constants[name] for name in needed), *nodes]
    read = dict.fromkeys(name for node in nodes for name in node.input)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(known[name].dtype), None)
        for name in read
        if name in known
    ]
    graph = helper.make_graph(
        nodes,
        model.graph.name,
        inputs,
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [tensor for tensor in model.graph.initializer if tensor.name in read],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
