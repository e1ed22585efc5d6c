"""The weights of one of our own graphs, read back under the names and in the shapes of the model that it is.

Names of tensors are those of products: `NAME.weight` [in, out] of a float one; `NAME.codes`, `.scales` and
`.zero_points` in blocks, two 4-bit codes a byte; or `NAME.codes` int8 [in, out], `.scales` and `.sums` of an integer
product. Linears of one input may be one product; see `llmopt.export.onnx.together`. Norms have their offset in them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from llmopt.errors import ArtifactError, UnsupportedError
from llmopt.export.checkpoint.packed import Ranges
from llmopt.export.onnx.graph import GRAPH_FILE
from llmopt.export.onnx.together import together
from llmopt.model.spec import Linear, ModelSpec, Norm, TensorSpec
from llmopt.model.stored import OpenFiles, StoredTensor
from llmopt.model.turned import turned_spec
from llmopt.quantize.int8 import CENTER
from llmopt.quantize.pack import unpack_bytes
from llmopt.quantize.scheme import CHANNEL, GROUP_SIZES, Scheme
from llmopt.quantize.weights import QuantizedWeight

_BLOCK_OPS = ("MatMulNBits", "GatherBlockQuantized")


@dataclass(frozen=True, slots=True)
class _Place:
    """A product of the graph, and which of its outputs are a linear's."""

    product: str
    first: int
    stop: int


class GraphWeights:
    """Weights of `model.onnx` in a folder: floats (`llmopt.model.checkpoint.Tensors`), and integers by their linears.

    Raises:
        ArtifactError: there is no graph, or it is none of ours.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        path = folder / GRAPH_FILE
        if not path.is_file():
            raise ArtifactError(f"there is no {GRAPH_FILE}", where=str(folder), hint="is the copy complete?")
        model = onnx.load(path, load_external_data=False)
        self._where = str(path)
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._stored = {name: _stored(tensor, folder) for name, tensor in self._tensors.items() if tensor.external_data}
        self._blocks = {node.name: _attributes(node) for node in model.graph.node if node.op_type in _BLOCK_OPS}
        self._files = OpenFiles()
        turned = f"{spec.head.name}.turn.weight" in self._stored
        self.spec = turned_spec(spec) if turned else spec
        self.turned = turned
        self._places = dict(self._all_places())
        self._offsets = {f"{norm.name}.weight": norm.offset for norm in _norms(self.spec)}
        self._linears = {linear.weight.name: linear for linear in _linears(self.spec)}
        self._biases = {f"{name}.bias": place for name, place in self._places.items()}

    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each linear, and of the table, that has one.

        A scale per channel that the graph repeats for blocks is taken for groups of their size, which is the same,
        where there are such groups.
        """
        names = [self.spec.embedding.name, *(linear.name for linear in self.spec.linears())]
        found = {name: self._scheme(self._place(name).product) for name in names}
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    def read(self, tensor: TensorSpec) -> Tensor:
        """A float tensor, float32, in the shape of the spec."""
        if tensor.name in self._linears:
            linear = self._linears[tensor.name]
            place = self._place(linear.name)
            weight_IO = self._array(f"{place.product}.weight")
            if linear.weight.name == self.spec.embedding.name + ".weight":
                return weight_IO
            weight_IO = weight_IO[:, place.first : place.stop]
            return (weight_IO if linear.transposed else weight_IO.T).contiguous()
        if tensor.name in self._biases:
            place = self._biases[tensor.name]
            return self._array(f"{place.product}.bias")[place.first : place.stop].clone()
        return self._array(tensor.name) - self._offsets.get(tensor.name, 0.0)

    def read_rows(self, tensor: TensorSpec, start: int, stop: int) -> Tensor:
        """Some rows of one; all of it is read."""
        return self.read(tensor)[start:stop].clone()

    def stored_dtype(self, tensor: TensorSpec) -> str:
        """Floats are float32."""
        del tensor
        return "F32"

    def require(self, linear: Linear, scheme: Scheme) -> None:
        """See that a weight is there in this scheme.

        Raises:
            ArtifactError: it is not.
        """
        if self._scheme(self._place(linear.name).product) != scheme:
            raise ArtifactError(f"{linear.name} is not stored in {scheme}", where=self._where)

    def scale_dtype(self, linear: Linear) -> torch.dtype:
        """The dtype that the scales of a weight are stored in."""
        stored = self._stored[f"{self._place(linear.name).product}.scales"]
        return torch.float16 if stored.dtype == "float16" else torch.float32

    def read_integers(self, linear: Linear, scheme: Scheme, rows: Ranges = (), columns: Ranges = ()) -> QuantizedWeight:
        """Some outputs and inputs of a weight; inputs begin and end with groups."""
        place = self._place(linear.name)
        rows = tuple((place.first + start, place.first + stop) for start, stop in rows or ((0, linear.out_features),))
        columns = columns or ((0, linear.in_features),)
        if scheme.activation_bits == 8:
            return self._channels(place.product, scheme, rows, columns)
        size = self._blocks[place.product]["block_size"]
        groups = ((0, 1),) if scheme.group_size is None else _groups(columns, size)
        codes, scales, zeros = (self._rows(place.product, part, rows) for part in ("codes", "scales", "zero_points"))
        assert codes is not None
        assert scales is not None
        codes_OI = _unpacked(codes.reshape(len(codes), -1), scheme.bits, linear.in_features)
        zeros_OG = None if zeros is None else _unpacked(zeros.reshape(len(zeros), -1), scheme.bits, scales.shape[1])
        return QuantizedWeight(
            scheme=scheme,
            codes_OI=_columns(codes_OI, columns),
            scales_OG=_columns(scales.float(), groups),
            zero_points_OG=None if zeros_OG is None else _columns(zeros_OG, groups),
        )

    def close(self) -> None:
        """Close the data file. Reading again opens it again."""
        self._files.close()

    def _channels(self, product: str, scheme: Scheme, rows: Ranges, columns: Ranges) -> QuantizedWeight:
        codes_IO = self._raw(f"{product}.codes")
        codes_OI = torch.cat([codes_IO[:, start:stop] for start, stop in rows], 1).T
        signed_OI = _columns(codes_OI, columns).to(torch.int16)
        scales_O = self._raw(f"{product}.scales").float()
        return QuantizedWeight(
            scheme=scheme,
            codes_OI=(signed_OI + CENTER).to(torch.uint8).contiguous(),
            scales_OG=torch.cat([scales_O[start:stop] for start, stop in rows])[:, None],
            zero_points_OG=None,
        )

    def _rows(self, product: str, part: str, rows: Ranges) -> Tensor | None:
        name = f"{product}.{part}"
        if name not in self._stored:
            return None
        return torch.cat([self._raw(name, start, stop) for start, stop in rows])

    def _array(self, name: str) -> Tensor:
        if name not in self._stored:
            raise ArtifactError(f"the graph has no {name}", where=self._where, hint="did llmopt write it?")
        return self._raw(name).float()

    def _raw(self, name: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor, or all of it, in the dtype that it is stored in."""
        stored = self._stored[name]
        count = stored.shape[0] if stop is None else stop - first
        row_bytes = stored.size_bytes // stored.shape[0]
        raw = np.empty(count * row_bytes, np.uint8)
        self._files.fill(memoryview(raw.data), stored, first * row_bytes)
        return torch.from_numpy(raw.view(stored.dtype).reshape(count, *stored.shape[1:]))

    def _scheme(self, product: str) -> Scheme | None:
        if f"{product}.codes" not in self._stored:
            return None
        if f"{product}.sums" in self._stored:
            return Scheme(bits=8, activation_bits=8, group_size=CHANNEL, symmetric=True)
        found = self._blocks.get(product)
        if found is None:
            raise UnsupportedError(f"{product} has codes that no known product reads", where=self._where)
        size = found["block_size"]
        return Scheme(
            bits=found["bits"],
            activation_bits=16,
            group_size=size if size in GROUP_SIZES else CHANNEL,
            symmetric=f"{product}.zero_points" not in self._stored,
        )

    def _place(self, name: str) -> _Place:
        return self._places[name]

    def _all_places(self) -> Iterator[tuple[str, _Place]]:
        """Which product each linear, and the table, is or is a part of."""
        spec, embedding = self.spec, self.spec.embedding
        yield embedding.name, _Place(embedding.name, 0, embedding.vocab_size)
        for block in spec.blocks:
            for name, linears in together(block).items():
                whole = any(f"{name}.{part}" in self._stored for part in ("weight", "codes"))
                first = 0
                for linear in linears:
                    start = first if whole else 0
                    yield linear.name, _Place(name if whole else linear.name, start, start + linear.out_features)
                    first += linear.out_features
            for linear in (block.attention.output, block.mlp.down):
                yield linear.name, _Place(linear.name, 0, linear.out_features)
        for linear in (spec.head, *([] if spec.before_head is None else [spec.before_head])):
            yield linear.name, _Place(linear.tied_to or linear.name, 0, linear.out_features)


def _linears(spec: ModelSpec) -> Iterator[Linear]:
    """Every product with a weight of its own, and the table."""
    embedding = spec.embedding
    yield Linear(name=embedding.name, out_features=embedding.vocab_size, in_features=embedding.width)
    yield from (linear for linear in spec.linears() if linear.tied_to is None)
    if spec.before_head is not None:
        yield spec.before_head


def _norms(spec: ModelSpec) -> Iterator[Norm]:
    yield from (norm for block in spec.blocks for norm in block.norms())
    yield spec.final_norm


def _attributes(node: NodeProto) -> dict[str, int]:
    return {item.name: item.i for item in node.attribute}


def _stored(tensor: TensorProto, folder: Path) -> StoredTensor:
    place = {item.key: item.value for item in tensor.external_data}
    path = folder / Path(place["location"]).name  # of our own graphs it is a name, and of others it may lead elsewhere
    dtype = str(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    size = int(np.prod(tensor.dims)) * np.dtype(dtype).itemsize
    return StoredTensor(
        tensor.name, tuple(tensor.dims), dtype, file=path, offset=int(place.get("offset", 0)), size_bytes=size
    )


def _groups(columns: Ranges, size: int) -> Ranges:
    return tuple((start // size, -(-stop // size)) for start, stop in columns)


def _unpacked(raw_RB: Tensor, bits: int, count: int) -> Tensor:
    return torch.from_numpy(unpack_bytes(raw_RB.numpy(), bits, count)) if bits < 8 else raw_RB[:, :count]


def _columns(values: Tensor, ranges: Ranges) -> Tensor:
    parts = [values[:, start:stop] for start, stop in ranges]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).contiguous()
