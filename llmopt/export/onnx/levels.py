"""The same graph at another accuracy level: level 0 computes in float32 what level 4 computes from int8 activations."""

from pathlib import Path

import onnx

from llmopt.export.onnx.graph import GRAPH_FILE


def at_level(folder: Path, level: int, name: str) -> Path:
    """Write `name` beside the graph: the same graph over the same data file, MatMulNBits at another level."""
    model = onnx.load(folder / GRAPH_FILE, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = level
    path = folder / name
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path
