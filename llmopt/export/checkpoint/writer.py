"""A model as a checkpoint, streamed: each part's tensors are written as they come, under the names of the source."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llmopt.export.checkpoint.files import Entry, SafetensorsFiles
from llmopt.model.spec import Block, Linear, ModelSpec, TensorSpec
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

Weights = Mapping[str, Tensor | QuantizedWeight]
Schemes = Mapping[str, Scheme | None]  # of every linear, by name
DtypeOf = Callable[[TensorSpec], torch.dtype]


class Packing(Protocol):
    """How a format stores one quantized weight."""

    def entries(self, linear: Linear, scheme: Scheme) -> Iterator[Entry]:
        """What it takes in a file."""
        ...

    def tensors(self, linear: Linear, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The same with its values."""
        ...


def entries(spec: ModelSpec, schemes: Schemes, packing: Packing, dtype_of: DtypeOf) -> Iterator[Entry]:
    """Everything that a checkpoint holds, in the order in which the model uses it. What has no scheme is float."""
    packed = _packed(spec, schemes)
    for tensor in spec.tensors():
        if tensor.name in packed:
            yield from packing.entries(*packed[tensor.name])
        else:
            yield Entry(tensor.name, dtype_of(tensor), tensor.shape)


class CheckpointWriter:
    """Call `embedding`, then `block` for each block, then `head`, then `save`; and `close`, whatever happens."""

    def __init__(self, folder: Path, spec: ModelSpec, schemes: Schemes, packing: Packing, dtype_of: DtypeOf) -> None:
        self.spec = spec
        self.packing = packing
        self.dtype_of = dtype_of
        self.packed = _packed(spec, schemes)
        self.files = SafetensorsFiles(folder, entries(spec, schemes, packing, dtype_of))

    def embedding(self, weights: Weights) -> None:
        """The token table, and learned positions."""
        self._write(self.spec.embedding.tensors(), weights)

    def block(self, block: Block, weights: Weights) -> None:
        """One block."""
        self._write(block.tensors(), weights)

    def head(self, weights: Weights) -> None:
        """The final norm and the head; a tied one is in the file already."""
        self._write([*self.spec.final_norm.tensors(), *self.spec.head.tensors()], weights)

    def save(self) -> None:
        """End the files."""
        self.files.save()

    def close(self) -> None:
        """Close them, which an error may have left open."""
        self.files.close()

    def _write(self, tensors: Iterable[TensorSpec], weights: Weights) -> None:
        for tensor in tensors:
            weight = weights[tensor.name]
            if isinstance(weight, QuantizedWeight):
                for name, values in self.packing.tensors(self.packed[tensor.name][0], weight).items():
                    self.files.write(name, values)
            else:
                stored = weight.to(self.dtype_of(tensor))
                assert torch.equal(stored.float(), weight.float()), f"{tensor.name} is not {stored.dtype}"
                self.files.write(tensor.name, stored)


def _packed(spec: ModelSpec, schemes: Schemes) -> dict[str, tuple[Linear, Scheme]]:
    """Linears that have a scheme, by the name of their weight in the source."""
    found = ((linear, schemes[linear.name]) for linear in spec.linears())
    return {linear.weight.name: (linear, scheme) for linear, scheme in found if scheme is not None}
