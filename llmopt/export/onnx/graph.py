"""A graph under construction: nodes in order, and tensors that go to the data file the moment they are known.

Only the nodes stay in memory. Offsets are multiples of 64 bytes: onnxruntime maps tensors where they lie, and its
kernels read whole cache lines.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from llmopt.export.onnx.kernels import Choose, default_kernel

GRAPH_FILE = "model.onnx"
DATA_FILE = f"{GRAPH_FILE}.data"
ALIGNMENT = 64
OPSET = 21
IR_VERSION = 10  # with opset 21 the newest that onnxruntime-genai 0.18's own builder relies on
MICROSOFT = "com.microsoft"
NEW_DTYPE = frozenset({"Cast", "Shape"})  # operators that do not give the dtype of their first input


class DataFile:
    """The external data of a graph, appended to as tensors come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("wb")

    def add(self, name: str, array: NDArray[Any]) -> TensorProto:
        """Write a tensor, and give the entry that points at its bytes."""
        self.file.write(b"\0" * (-self.file.tell() % ALIGNMENT))
        offset = self.file.tell()
        contiguous = np.ascontiguousarray(array)
        self.file.write(contiguous.data.cast("B") if contiguous.size else b"")
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        return self.entry(name, array.shape, kind, {"offset": offset, "length": contiguous.nbytes})

    def entry(self, name: str, shape: Sequence[int], kind: int, place: dict[str, int]) -> TensorProto:
        """A tensor whose bytes lie at a place in here."""
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": self.path.name, **place}.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def close(self) -> None:
        """Flush everything to the disk. What is closed already stays so."""
        if self.file.closed:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class Graph:
    """Nodes and tensors. Every method that computes gives the name of its (first) output.

    `choose` says which kernel a weight-only product gets, `file` what the graph is called: its data is `file`.data.
    """

    def __init__(
        self,
        folder: Path,
        choose: Choose = default_kernel,
        *,
        file: str = GRAPH_FILE,
        ir_version: int = IR_VERSION,
    ) -> None:
        self.folder = folder
        self.path = folder / file
        self.choose = choose
        self.values: set[str] = set()
        self.data = DataFile(folder / f"{file}.data")
        # Filled in place: a deep model has tens of thousands of nodes, and helper.make_graph would copy them all.
        self.model = helper.make_model(
            onnx.GraphProto(name="decoder"),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
            ir_version=ir_version,
            producer_name="llmopt",
        )
        self.nodes, self.outputs = self.model.graph.node, self.model.graph.output
        self.tensors: dict[str, TensorProto] = {}
        self.half: set[str] = set()  # names of values and tensors that are float16; all other floats are float32
        # A value [batch, tokens, …] of as many tokens as all that is being computed, if it was said.
        self.like: str | None = None

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node. Without `outputs` it has one, named after the node."""
        names = list(outputs) or [f"{name}/output"]
        self.values.update(names)
        if attributes.get("to") == TensorProto.FLOAT16 or (op not in NEW_DTYPE and inputs[0] in self.half):
            self.half.update(names)
        self.nodes.append(helper.make_node(op, list(inputs), names, name=name, domain=domain, **attributes))
        return names[0]

    def tensor(self, name: str, array: NDArray[Any]) -> str:
        """Write a tensor to the data file."""
        assert name not in self.tensors, name
        self.tensors[name] = self.data.add(name, array)
        return self._typed(name, array)

    def _typed(self, name: str, array: NDArray[Any]) -> str:
        if array.dtype == np.float16:
            self.half.add(name)
        return name

    def cast(self, x: str, *, half: bool) -> str:
        """A float value in float16 or float32: itself, or what one Cast makes of it for all that ask."""
        if (x in self.half) == half:
            return x
        name = f"{x}/{'float16' if half else 'float32'}"
        if name not in self.values:
            to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            self.node("Cast", [x], name, outputs=[name], to=to)
        return name

    def widest(self, *names: str) -> tuple[str, ...]:
        """Values as they are added or multiplied: all float16, or all float32."""
        half = all(name in self.half for name in names)
        return tuple(self.cast(name, half=half) for name in names)

    def alias(self, name: str, of: str, shape: Sequence[int]) -> str:
        """Another view of a tensor that is written already: the same bytes on disk, another shape."""
        original = self.tensors[of]
        assert int(np.prod(shape)) == int(np.prod(original.dims)), (shape, original.dims)
        place = {item.key: int(item.value) for item in original.external_data if item.key != "location"}
        self.tensors[name] = self.data.entry(name, shape, original.data_type, place)
        return name

    def constant(self, value: NDArray[Any] | np.generic, name: str | None = None) -> str:
        """A small tensor inside the graph file; equal ones without a name are shared."""
        array = np.asarray(value)
        name = name or f"constant/{array.dtype}{list(array.shape)}/{'_'.join(map(str, array.ravel().tolist()))}"
        self.tensors.setdefault(name, numpy_helper.from_array(array, name))
        return self._typed(name, array)

    def kind(self, name: str) -> int:
        """The type of a float value, as graphs name it."""
        return TensorProto.FLOAT16 if name in self.half else TensorProto.FLOAT

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """Declare an input of the graph."""
        self.model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: Sequence[int | str]) -> None:
        """Declare an output of the graph."""
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def save(self, producer_version: str) -> onnx.ModelProto:
        """Close the data file and write the graph beside it. The bytes depend on nothing but what was added."""
        self.data.close()
        self.model.producer_version = producer_version
        self.model.graph.initializer.extend(self.tensors.values())
        self.path.write_bytes(self.model.SerializeToString(deterministic=True))
        return self.model
