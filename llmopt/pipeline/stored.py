"""Models whose weights are stored as integers: which schemes those have, and how they are read, whole or in part.

What `llmopt quantize --format hf` writes is one, and so is any checkpoint of compressed-tensors in schemes that llmopt
has names for. A model of floats is none.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass

from torch import Tensor

from llmopt.artifact import MANIFEST, read_manifest
from llmopt.errors import UnsupportedError
from llmopt.export.checkpoint.config_schemes import config_schemes
from llmopt.export.checkpoint.packed import PackedWeights, Ranges
from llmopt.model.checkpoint import Checkpoint, open_checkpoint
from llmopt.model.safetensors_files import read_tables
from llmopt.model.source import CONFIG, ModelSource, open_source
from llmopt.model.spec import Linear, ModelSpec, TensorSpec
from llmopt.progress import Progress, Silent
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

Schemes = Mapping[str, Scheme]  # by the names of linears, and of the token table
_READ = ("hf",)  # of the formats of artifacts
_SILENT = Silent()


def open_model(
    model: str, *, revision: str | None = None, weights: bool = True, progress: Progress = _SILENT
) -> ModelSource:
    """A model of floats or of integers; see `open_source`.

    Raises:
        UnsupportedError: it is an artifact of which ranks cannot read their parts.
        LlmoptError: see `open_source`.
    """
    source = open_source(model, revision=revision, weights=weights, quantized=True, progress=progress)
    if source.folder is not None and (source.folder / MANIFEST).is_file():
        found = read_manifest(source.folder)
        if found.format not in _READ:
            what = f"ranks cannot read their parts of an artifact of format {found.format}"
            raise UnsupportedError(what, where=model, hint="llmopt quantize MODEL -o OUT --format hf writes another")
    return source


def stored_schemes(source: ModelSource) -> Schemes | None:
    """The schemes that a model's weights are stored in; None for a model of floats.

    Raises:
        LlmoptError: what its config says of them is not understood.
    """
    if source.quantization is None:
        return None
    where = source.name if source.folder is None else str(source.folder / CONFIG)
    return config_schemes(source.spec, source.quantization, where=where)


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Floats and integers of one model; satisfies `llmopt.model.checkpoint.Tensors`, integers being what they mean.

    `linears` has those that are stored as integers, by the names of weights in the model's spec.
    """

    floats: Checkpoint
    integers: PackedWeights
    linears: Mapping[str, tuple[Linear, Scheme]]

    def read(self, tensor: TensorSpec) -> Tensor:
        """The whole tensor, float32, in the shape of the spec."""
        if tensor.name not in self.linears:
            return self.floats.read(tensor)
        return self.quantized(tensor).dequantize()

    def read_rows(self, tensor: TensorSpec, start: int, stop: int) -> Tensor:
        """Some rows of it."""
        if tensor.name not in self.linears:
            return self.floats.read_rows(tensor, start, stop)
        return self.quantized(tensor, rows=((start, stop),)).dequantize()

    def quantized(self, tensor: TensorSpec, rows: Ranges = (), columns: Ranges = ()) -> QuantizedWeight:
        """The integers themselves, or some of them."""
        return self.integers.read(*self.linears[tensor.name], rows=rows, columns=columns)


@contextmanager
def open_stored(source: ModelSource, schemes: Schemes) -> Iterator[StoredWeights]:
    """The weights of a model that is stored in these schemes. All of them are there once this has begun.

    Raises:
        ModelError: one is missing, or is another.
    """
    linears = by_weight(source.spec, schemes)
    assert source.folder is not None
    with (
        open_checkpoint(source, without=linears.keys()) as floats,
        closing(PackedWeights(read_tables(source.folder), where=str(source.folder))) as integers,
    ):
        for linear, scheme in linears.values():
            integers.require(linear, scheme)
        yield StoredWeights(floats, integers, linears)


def by_weight(spec: ModelSpec, schemes: Schemes) -> dict[str, tuple[Linear, Scheme]]:
    """Linears that have a scheme, by the names of their weights."""
    return {one.weight.name: (one, schemes[one.name]) for one in spec.linears() if one.name in schemes}
