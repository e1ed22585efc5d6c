"""compressed-tensors: safetensors that transformers opens.

Embedding and head stay float: transformers has no module for a quantized table, and engines expect a float one. Scales
are positive and stored in the dtype of the model, as engines read them; codes are found for them as stored.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmopt.artifact import write_json
from llmopt.engine.transformers import TransformersEngine, require_package
from llmopt.errors import ArtifactError, UnsupportedError, UsageError, VerificationError
from llmopt.export.checkpoint import compressed_tensors
from llmopt.export.checkpoint.compressed_tensors import CompressedTensors, quantization_config
from llmopt.export.checkpoint.rules import require_linears
from llmopt.export.checkpoint.writer import CheckpointWriter, entries
from llmopt.model.source import CONFIG, ModelSource
from llmopt.model.spec import Block, ModelSpec
from llmopt.pipeline.calibration import Weights
from llmopt.pipeline.formats.base import Assignments
from llmopt.pipeline.formats.rounding import RoundingWriter
from llmopt.pipeline.verify import (
    FLOAT_TOLERANCE,
    ROUNDING_FACTOR,
    References,
    Verification,
    agree,
    compare,
    require,
)
from llmopt.progress import Progress
from llmopt.quantize.assign import TableRule
from llmopt.quantize.execute import Rounding, round_rows_symmetric
from llmopt.quantize.grid import ScaleRule
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT_BYTES = 4
PACKAGE_BYTES = 80 * 2**20  # of memory, for what transformers imports to open a model
# transformers lays all tokens of opt's MLPs in one matrix, and compressed-tensors then gives them one range together.
ONE_MATRIX = ("opt",)
FLOAT_TABLES = TableRule(scheme=None, reason="the format hf keeps the embedding and the head as floats")


@dataclass(frozen=True, kw_only=True)
class Hf:
    """The format `hf`."""

    name: str = "hf"
    engine: str = "transformers"
    tables: TableRule = FLOAT_TABLES
    rounding: Rounding = round_rows_symmetric
    before_head: bool = False

    def scales(self, spec: ModelSpec) -> ScaleRule:
        """Positive, and in the model's dtype."""
        return ScaleRule(signed=False, dtype=DTYPES[spec.dtype])

    def check(self, spec: ModelSpec) -> None:
        """See that the package is there, that linears are Linear modules, and that the dtype can be stored."""
        require_package()
        require_linears(spec, self.name)
        if spec.dtype not in DTYPES:
            raise UnsupportedError(
                f"the config says dtype {spec.dtype}, and format {self.name} has {', '.join(DTYPES)}",
                hint="--format onnx",
            )

    def check_layers(self, spec: ModelSpec, assignments: Assignments) -> None:
        """See that weights are whole groups and words, and that what engines multiply at once has one scheme."""
        compressed_tensors.require(spec, assignments)
        if all(item.scheme is None for item in assignments.values()):
            raise UsageError("no layer is quantized", hint="leave some of --ignore out")
        _require_ranges_per_token(spec, assignments)

    def estimated_bytes(self, spec: ModelSpec, assignments: Assignments) -> int:
        """Every tensor; only the header is left out."""
        dtype = DTYPES[spec.dtype]
        found = entries(spec, _schemes(spec, assignments), CompressedTensors(dtype), lambda tensor: dtype)
        return sum(entry.size_bytes for entry in found)

    def verification_bytes(
        self, spec: ModelSpec, assignments: Assignments, output_bytes: int, logits_bytes: int
    ) -> int:
        """The whole model in float32, as transformers computes with it; what that is unpacked from, and mapped from."""
        weights = FLOAT_BYTES * sum(tensor.count for tensor in spec.tensors())
        return PACKAGE_BYTES + weights + 2 * output_bytes + logits_bytes

    def write_companions(self, source: ModelSource, assignments: Assignments, folder: Path) -> None:
        """The model's config with what was quantized and how, and the dtype of the rest said outright."""
        own = {name: value for name, value in source.config.items() if name != "torch_dtype"}
        found = quantization_config(source.spec, assignments)
        write_json(folder / CONFIG, own | {"dtype": source.spec.dtype, "quantization_config": found})

    def writer(self, spec: ModelSpec, assignments: Assignments, folder: Path) -> "HfWriter":
        """Begin the files."""
        dtype = DTYPES[spec.dtype]
        packing = CompressedTensors(dtype)
        files = CheckpointWriter(folder, spec, _schemes(spec, assignments), packing, lambda tensor: dtype)
        return HfWriter(files, dtype)

    def verify(self, folder: Path, references: References, threads: int, progress: Progress) -> Verification:
        """Open the folder as its users do, but in float32: what is stored in 16 bits is widened without loss.

        The whole model is in memory here, which writing it is not.
        """
        exact, rounded = references.exact, references.rounded
        with progress.task("comparing transformers with the model in torch", total=3) as task:
            try:
                engine = TransformersEngine(folder, threads)
            except ArtifactError as error:
                raise VerificationError(error.what, where=error.where) from error
            task.advance()
            engine.round_activations(False)
            agreement = compare(engine, exact)
            require(agreement, FLOAT_TOLERANCE, "in float32")
            task.advance()
            engine.round_activations(True)
            shipped, in_torch = compare(engine, exact), None
            if rounded is not None:
                in_torch = agree([(exact.logits(index), rounded.logits(index)) for index in range(len(exact.windows))])
                bound = ROUNDING_FACTOR * in_torch.relative_error + FLOAT_TOLERANCE
                require(shipped, bound, "with rounded activations")
            task.advance()
        return Verification(exact=agreement, shipped=shipped, rounded=in_torch)

    def finish(self, spec: ModelSpec, assignments: Assignments, folder: Path) -> None:
        """Nothing is left to decide: engines choose their kernels themselves."""


class HfWriter(RoundingWriter):
    """A checkpoint of compressed-tensors."""

    def block(self, block: Block, weights: Weights) -> Weights:
        """See `Writer`."""
        return {name: self._read_again(weight) for name, weight in super().block(block, weights).items()}

    def _read_again(self, weight: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
        # transformers unpacks weights with zero points while it loads, in the dtype of their scales.
        if isinstance(weight, QuantizedWeight) and not weight.scheme.symmetric:
            return weight.dequantize().to(self.dtype).float()
        return weight


def _require_ranges_per_token(spec: ModelSpec, assignments: Assignments) -> None:
    if spec.family not in ONE_MATRIX:
        return
    for block in spec.blocks:
        for linear in (*block.mlp.inputs, block.mlp.down):
            scheme = assignments[linear.name].scheme
            if scheme is not None and scheme.activation_bits == 8:
                raise UnsupportedError(
                    f"{linear.name} is to have {scheme}, and transformers would round the activations of "
                    f"{spec.family}'s MLPs by one range for all tokens, not by one a token",
                    hint="--override 'fc*=w8a16', or --format onnx",
                )


def _schemes(spec: ModelSpec, assignments: Assignments) -> dict[str, Scheme | None]:
    return {linear.name: assignments[linear.name].scheme for linear in spec.linears()}


HF = Hf()
