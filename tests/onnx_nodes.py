"""Run a few nodes in onnxruntime."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from llmopt.engine.ort import open_session
from llmopt.export.onnx.graph import GRAPH_FILE, IR_VERSION, MICROSOFT, OPSET, Graph
from llmopt.export.onnx.levels import in_float32
from llmopt.export.onnx.one_token import without_short_ways

Array = NDArray[Any]
OPSETS = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]


def run_node(op: str, inputs: Sequence[Array | None], **attributes: Any) -> Array:
    """One of onnxruntime's own operators: the first input is fed, the others are initializers, None is left out."""
    names = ["x", *("" if array is None else f"input_{index}" for index, array in enumerate(inputs[1:]))]
    fed = inputs[0]
    assert fed is not None
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], domain=MICROSOFT, **attributes)],
        "node",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(fed.dtype), fed.shape)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(a, name) for a, name in zip(inputs[1:], names[1:], strict=True) if a is not None],
    )
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=IR_VERSION)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    output: Array = session.run(None, {"x": fed})[0]
    return output


def open_graph(graph: Graph, outputs: Mapping[str, int] | Sequence[str]) -> onnxruntime.InferenceSession:
    """A graph under construction, written and opened; its outputs are float unless a type is given."""
    kinds = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs, TensorProto.FLOAT)
    for name, kind in kinds.items():
        graph.outputs.append(helper.make_tensor_value_info(name, kind, None))
    graph.save("0")
    return open_session(graph.folder / GRAPH_FILE, graph.folder, threads=1)


def long_way(folder: Path) -> onnx.ModelProto:
    """The graph in a folder without the short ways of one token, so that all of its nodes are the main graph's."""
    return without_short_ways(onnx.load(folder / GRAPH_FILE, load_external_data=False))


def float32_session(folder: Path) -> onnxruntime.InferenceSession:
    """The graph in a folder with activations in float32."""
    twin = in_float32(onnx.load(folder / GRAPH_FILE, load_external_data=False))
    return open_session(twin.SerializeToString(), folder, threads=1)


def relative_error(actual: Array, expected: Array) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
