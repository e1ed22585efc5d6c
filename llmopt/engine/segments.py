"""A graph run a few nodes at a time: no more of it is open, or computed before it is needed, than one segment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

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
    """
    nodes = list(model.graph.node)
    last_use = {name: place for place, node in enumerate(nodes) for name in node.input if name}
    last_use[output] = len(nodes)
    kept: list[Values] = [dict(feed) for feed in feeds]
    for start in range(0, len(nodes), segment_nodes):
        stop = min(start + segment_nodes, len(nodes))
        outputs = [name for node in nodes[start:stop] for name in node.output if last_use.get(name, -1) >= stop]
        if not outputs:  # what only other engines read
            continue
        part = segment(model, start, stop, kept[0], outputs)
        session = open_session(part.SerializeToString(), folder, threads)
        inputs = [value.name for value in part.graph.input]
        for values in kept:
            # Copied, for in its output lives all the memory that a session has: 2 MB for one number.
            found = map(np.copy, session.run(outputs, {name: values[name] for name in inputs}))
            values.update(zip(outputs, found, strict=True))
            for name in [name for name in values if last_use.get(name, -1) < stop]:
                del values[name]
    return [values[output] for values in kept]


def segment(model: ModelProto, start: int, stop: int, known: Values, outputs: Sequence[str]) -> ModelProto:
    """Nodes `start` to `stop` as a graph of their own; it reads what is `known` already."""
    nodes = model.graph.node[start:stop]
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
