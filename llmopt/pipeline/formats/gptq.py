"""GPTQ: the checkpoint layout of AutoGPTQ and GPTQModel, for engines that read no other.

All that is not quantized is float16, as those engines compute. None of them is a dependency, for they want GPUs: what
was written is read back by an unpacker of its own, and computed in torch.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from llmopt.artifact import write_json
from llmopt.engine.gptq import GptqTensors
from llmopt.engine.torch import TorchEngine, fits_in_memory
from llmopt.errors import UnsupportedError
from llmopt.export.checkpoint import gptq
from llmopt.export.checkpoint.rules import require_linears
from llmopt.export.checkpoint.writer import CheckpointWriter, entries
from llmopt.model.source import CONFIG, ModelSource
from llmopt.model.spec import ModelSpec
from llmopt.pipeline.formats.base import Assignments
from llmopt.pipeline.formats.rounding import RoundingWriter
from llmopt.pipeline.verify import FLOAT_TOLERANCE, References, Verification, compare, require
from llmopt.progress import Progress
from llmopt.quantize.assign import TableRule
from llmopt.quantize.execute import Rounding, round_rows
from llmopt.quantize.grid import ScaleRule
from llmopt.quantize.scheme import Scheme

FLOAT_BYTES = 4
QUANTIZE_CONFIG = "quantize_config.json"
FLOAT_TABLES = TableRule(scheme=None, reason="the format gptq keeps the embedding and the head as floats")
# Their activations pass the end of float16: vLLM refuses it for them, and others compute infinities.
OUT_OF_RANGE = ("gemma3",)


@dataclass(frozen=True, kw_only=True)
class GptqFormat:
    """The format `gptq`."""

    name: str = gptq.FORMAT
    engine: str = "GPTQModel or vLLM"
    tables: TableRule = FLOAT_TABLES
    rounding: Rounding = round_rows  # of no use: no scheme here rounds activations
    before_head: bool = False

    def scales(self, spec: ModelSpec) -> ScaleRule:
        """Positive, and float16."""
        return ScaleRule(signed=False, dtype=gptq.DTYPE)

    def check(self, spec: ModelSpec) -> None:
        """See that linears are Linear modules, and that the model can compute in float16."""
        require_linears(spec, self.name)
        if spec.family in OUT_OF_RANGE:
            raise UnsupportedError(
                f"engines compute format {self.name} in float16, which {spec.family}'s activations overflow",
                hint="--format hf",
            )

    def check_layers(self, spec: ModelSpec, assignments: Assignments) -> None:
        """See that all linears of the blocks have one scheme, and that it is one the layout can hold."""
        gptq.require(spec, assignments)

    def estimated_bytes(self, spec: ModelSpec, assignments: Assignments) -> int:
        """Every tensor; only the header is left out."""
        found = entries(spec, _schemes(spec, assignments), gptq.Gptq(), lambda tensor: gptq.DTYPE)
        return sum(entry.size_bytes for entry in found)

    def verification_bytes(
        self, spec: ModelSpec, assignments: Assignments, output_bytes: int, logits_bytes: int
    ) -> int:
        """The files, which are mapped; and the whole model in float32 where `TorchEngine` keeps it, else a block."""
        kept = spec.tensors() if fits_in_memory(spec) else spec.blocks[0].tensors()
        return FLOAT_BYTES * sum(tensor.count for tensor in kept) + output_bytes + logits_bytes

    def write_companions(self, source: ModelSource, assignments: Assignments, folder: Path) -> None:
        """The model's config with what was quantized and how, and the latter once more for older readers."""
        found = gptq.quantization_config(gptq.only_scheme(source.spec, assignments))
        own = {name: value for name, value in source.config.items() if name != "dtype"}
        # `torch_dtype` rather than `dtype`: transformers before 4.56 knows no other word, and later ones know it too.
        write_json(folder / CONFIG, own | {"torch_dtype": "float16", "quantization_config": found})
        write_json(folder / QUANTIZE_CONFIG, found)

    def writer(self, spec: ModelSpec, assignments: Assignments, folder: Path) -> RoundingWriter:
        """Begin the files."""
        files = CheckpointWriter(folder, spec, _schemes(spec, assignments), gptq.Gptq(), lambda tensor: gptq.DTYPE)
        return RoundingWriter(files, gptq.DTYPE)

    def verify(self, folder: Path, references: References, threads: int, progress: Progress) -> Verification:
        """Read the folder back by the definition of the layout, and compute with that in float32."""
        exact = references.exact
        torch.set_num_threads(threads)
        with (
            progress.task("comparing the checkpoint, read back, with the model in torch", total=1) as task,
            GptqTensors(folder) as tensors,
        ):
            agreement = compare(TorchEngine(exact.spec, tensors), exact)
            require(agreement, FLOAT_TOLERANCE, "in float32")
            task.advance()
        return Verification(exact=agreement, shipped=None, rounded=None)

    def finish(self, spec: ModelSpec, assignments: Assignments, folder: Path) -> None:
        """Nothing is left to decide: engines choose their kernels themselves."""


def _schemes(spec: ModelSpec, assignments: Assignments) -> dict[str, Scheme | None]:
    return {linear.name: assignments[linear.name].scheme for linear in spec.linears()}


GPTQ = GptqFormat()
