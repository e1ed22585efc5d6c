"""The weights of models that are stored as integers, read whole or in part."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmopt.export.checkpoint.packed import PackedWeights, Ranges
from llmopt.export.onnx.stored import GraphWeights
from llmopt.model.checkpoint import Tensors, open_checkpoint
from llmopt.model.safetensors_files import read_tables
from llmopt.model.source import ModelSource
from llmopt.model.spec import Linear, ModelSpec, TensorSpec
from llmopt.pipeline.stored import Schemes, stored_format
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight


class Floats(Tensors, Protocol):
    """Tensors that are stored as floats."""

    def stored_dtype(self, tensor: TensorSpec) -> str:
        """The word of safetensors for it."""
        ...


class Integers(Protocol):
    """Weights that are stored as integers."""

    def require(self, linear: Linear, scheme: Scheme) -> None:
        """See that one is there."""
        ...

    def scale_dtype(self, linear: Linear) -> torch.dtype:
        """What its scales are stored in."""
        ...

    def read_integers(self, linear: Linear, scheme: Scheme, rows: Ranges = (), columns: Ranges = ()) -> QuantizedWeight:
        """Some of its outputs and inputs."""
        ...


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Floats and integers of one model; satisfies `llmopt.model.checkpoint.Tensors`, integers being what they mean.

    `linears` has those that are stored as integers, by the names of weights in the model's spec.
    """

    floats: Floats
    integers: Integers
    linears: Mapping[str, tuple[Linear, Scheme]]

    def read(self, tensor: TensorSpec) -> Tensor:
        """The whole tensor, float32, in the shape of the spec."""
        if tensor.name not in self.linears:
            return self.floats.read(tensor)
        return self._as_stored(tensor, self.quantized(tensor).dequantize())

    def read_rows(self, tensor: TensorSpec, start: int, stop: int) -> Tensor:
        """Some rows of it."""
        if tensor.name not in self.linears:
            return self.floats.read_rows(tensor, start, stop)
        return self.read(tensor)[start:stop].clone()

    def quantized(self, tensor: TensorSpec, rows: Ranges = (), columns: Ranges = ()) -> QuantizedWeight:
        """The integers themselves, or some of them."""
        return self.integers.read_integers(*self.linears[tensor.name], rows=rows, columns=columns)

    def _as_stored(self, tensor: TensorSpec, floats_OI: Tensor) -> Tensor:
        return floats_OI.T.contiguous() if self.linears[tensor.name][0].transposed else floats_OI


@contextmanager
def open_stored(source: ModelSource, schemes: Schemes) -> Iterator[StoredWeights]:
    """The weights of a model that is stored in these schemes. All of them are there once this has begun.

    Raises:
        ModelError: one is missing, or is another.
    """
    linears = by_weight(source.spec, schemes)
    assert source.folder is not None
    if stored_format(source) == "onnx":
        with closing(GraphWeights(source.folder, source.spec)) as graph:
            for linear, scheme in linears.values():
                graph.require(linear, scheme)
            yield StoredWeights(graph, graph, linears)
        return
    with (
        open_checkpoint(source, without=linears.keys()) as floats,
        closing(PackedWeights(read_tables(source.folder), where=str(source.folder))) as integers,
    ):
        for linear, scheme in linears.values():
            integers.require(linear, scheme)
        yield StoredWeights(floats, integers, linears)


def by_weight(spec: ModelSpec, schemes: Schemes) -> dict[str, tuple[Linear, Scheme]]:
    """Linears that have a scheme, and the table, by the names of their weights."""
    embedding = spec.embedding
    table = Linear(name=embedding.name, out_features=embedding.vocab_size, in_features=embedding.width)
    found: dict[str, tuple[Linear, Scheme]] = {}
    for linear in (table, *spec.linears()):
        if linear.name in schemes:
            found.setdefault(linear.weight.name, (linear, schemes[linear.name]))
    return found
