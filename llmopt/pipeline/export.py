"""A model as an artifact, quantized or not: streamed into its files, and through the reference beside them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from llmopt.artifact import Journal, write_json
from llmopt.model.checkpoint import Tensors, open_checkpoint
from llmopt.model.source import GENERATION_CONFIG, ModelSource
from llmopt.model.spec import ModelSpec
from llmopt.model.tokenizer import Tokenizer
from llmopt.model.turned import TurnedTensors, turned_spec
from llmopt.pipeline.calibration import Calibration
from llmopt.pipeline.calibration_text import CalibrationText
from llmopt.pipeline.formats.base import Format
from llmopt.pipeline.formats.onnx import ONNX
from llmopt.pipeline.journal import PartJournal
from llmopt.pipeline.pace import Pace
from llmopt.pipeline.parts import PartReader
from llmopt.pipeline.qat.parts import Parts
from llmopt.pipeline.qat.training import Training, trained_parts
from llmopt.pipeline.ranks import ALONE, Ranks
from llmopt.pipeline.repair import with_reasons
from llmopt.pipeline.soundness import open_tokenizer
from llmopt.pipeline.spill import States, limit_bytes
from llmopt.pipeline.verify import References, Verification
from llmopt.pipeline.windows import verification_windows
from llmopt.progress import Progress, Silent
from llmopt.quantize.assign import Assignment
from llmopt.quantize.fold import Fold
from llmopt.quantize.method import Method
from llmopt.quantize.rotate import Rotate
from llmopt.report.results import LayerResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What to write: each layer's scheme, and the method that finds its numbers (None: every layer stays float)."""

    source: ModelSource
    assignments: Mapping[str, Assignment]
    method: Method | None
    seed: int
    threads: int
    calibration: CalibrationText | None = None  # for a method that needs inputs
    folds: tuple[Fold, ...] = ()
    format: Format = ONNX
    journal: Journal | None = None  # of a calibrated method: where finished parts are kept
    ranks: Ranks = ALONE
    turn: int | None = None  # the seed of the rotation of the residual stream; None: it is as stored
    pace: Pace = field(default_factory=Pace)
    training: Training | None = None  # of what the method has quantized

    @property
    def spec(self) -> ModelSpec:
        """The model's, as it is written."""
        return self.source.spec if self.turn is None else turned_spec(self.source.spec)

    @contextmanager
    def tensors(self) -> Iterator[Tensors]:
        """The tensors of `spec`."""
        with open_checkpoint(self.source) as checkpoint:
            if self.turn is None:
                yield checkpoint
            else:
                turn_HH = Rotate().of_stream(self.source.spec.hidden_size, self.turn)
                yield TurnedTensors(checkpoint, self.source.spec, turn_HH)

    @property
    def holds_out(self) -> bool:
        """Whether the method is to be judged on text that it was not fitted to."""
        return self.method is not None and bool(self.method.candidates)


def export(job: Export, folder: Path, progress: Progress) -> tuple[tuple[LayerResult, ...], Verification]:
    """Write weights, configs and tokenizer into `folder`; gives each layer's result and how well they agree.

    Raises:
        LlmoptError: the weights are damaged, or the artifact does not compute what the quantized model computes.
    """
    import torch  # noqa: PLC0415 (late: a mistake in a request should not wait for it)

    torch.set_num_threads(job.threads)
    write_companions(job, folder)
    windows = verification_windows(job.spec, folder, job.seed)
    references = References(
        job.spec,
        windows,
        rounds_activations=rounds_activations(job.assignments),
        rounding=job.format.rounding,
    )
    calibration = None
    if job.calibration is not None:
        windows = job.calibration.windows(job.spec, Tokenizer.from_folder(folder))
        states = partial(States, limit_bytes(), folder)
        calibration = Calibration(job.spec, windows, job.ranks, states, holds_out=job.holds_out)
    layers = write_parts(job, folder, references, progress, calibration)
    del calibration  # verification needs the memory
    verification = job.format.verify(folder, references, job.threads, progress)
    job.format.finish(job.spec, job.assignments, folder)
    if verification.activations is not None:
        layers = with_reasons(layers, job.spec, verification.activations.unrounded)
    return layers, verification


def assist(job: Export) -> None:
    """What all processes but the first do: their share of the same parts, of which they write nothing.

    Raises:
        LlmoptError: the weights are damaged, or another process has failed.
    """
    import torch  # noqa: PLC0415

    torch.set_num_threads(job.threads)
    assert job.calibration is not None
    windows = job.calibration.windows(job.spec, open_tokenizer(job.source))
    calibration = Calibration(job.spec, windows, job.ranks, holds_out=job.holds_out)
    with job.tensors() as tensors:
        parts = trained(job, part_reader(job, tensors, calibration), open_tokenizer(job.source), Silent())
        embedding = parts.embedding()
        for _ in parts.blocks():
            pass
        parts.head(embedding)


def part_reader(
    job: Export, tensors: Tensors, calibration: Calibration | None, journal: PartJournal | None = None
) -> PartReader:
    """What quantizes the model, part by part."""
    return PartReader(
        job.spec,
        tensors,
        job.assignments,
        job.method,
        calibration,
        folds=job.folds,
        journal=journal,
        turned=job.turn is not None,
        pace=Pace() if job.training is not None else job.pace,  # what is trained has the minutes
    )


def trained(
    job: Export,
    parts: PartReader,
    tokenizer: Tokenizer,
    progress: Progress,
    states: Callable[[], States] = States,
) -> Parts:
    """The parts as they are handed on, trained where that was asked for."""
    if job.training is None:
        return parts
    return trained_parts(
        job.training,
        parts,
        tokenizer,
        job.format.rounding,
        states=states,
        journal=parts.journal,
        pace=job.pace,
        seed=job.seed,
        progress=progress,
    )


def write_parts(
    job: Export, folder: Path, references: References, progress: Progress, calibration: Calibration | None = None
) -> tuple[LayerResult, ...]:
    """Stream the model part by part: read, quantize, write, run the references, forget."""
    spec = job.spec
    layers: list[LayerResult] = []
    journal = None
    if job.journal is not None and calibration is not None:
        journal = PartJournal(job.journal, job.assignments, calibration.windows, progress, job.turn)
        journal.announce(spec)
    with (
        closing(job.format.writer(spec, job.assignments, folder)) as writer,
        job.tensors() as tensors,
        progress.task(f"writing {job.source.name}", total=len(spec.blocks) + 2) as task,
    ):
        reader = part_reader(job, tensors, calibration, journal)
        parts = trained(job, reader, Tokenizer.from_folder(folder), progress, partial(States, limit_bytes(), folder))
        embedding = parts.embedding()
        references.embedding(writer.embedding(embedding.weights))
        layers += embedding.layers
        task.advance(note="embedding done")
        for block, part in zip(spec.blocks, parts.blocks(), strict=True):
            references.block(block, writer.block(block, part.weights))
            layers += part.layers
            task.advance(note=f"block {block.index + 1} of {len(spec.blocks)} done")
        head = parts.head(embedding)
        references.head(writer.head(head.weights))
        layers += head.layers
        writer.save()
        task.advance(note="head done")
    return tuple(layers)


def write_companions(job: Export, folder: Path) -> None:
    """What lies beside the weights: configs and tokenizer."""
    job.source.write_tokenizer(folder)
    if job.source.generation_config:
        write_json(folder / GENERATION_CONFIG, job.source.generation_config)
    job.format.write_companions(job.source, job.assignments, folder)


def rounds_activations(assignments: Mapping[str, Assignment]) -> bool:
    """Whether any layer is to get 8-bit activations."""
    schemes = (item.scheme for item in assignments.values())
    return any(scheme is not None and scheme.activation_bits == 8 for scheme in schemes)
