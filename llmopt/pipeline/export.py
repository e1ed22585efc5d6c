"""A model as an ONNX artifact, quantized or not: streamed into the graph, and through the reference beside it."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from llmopt import __version__
from llmopt.artifact import Journal, write_json
from llmopt.export.genai import GENAI_CONFIG, genai_config
from llmopt.export.onnx.decoder import DecoderGraph
from llmopt.export.onnx.graph import GRAPH_FILE
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.source import CONFIG, GENERATION_CONFIG, ModelSource
from llmopt.model.spec import ModelSpec
from llmopt.model.storage import quantized_bytes
from llmopt.model.tokenizer import Tokenizer
from llmopt.pipeline.calibration import Calibration, CalibrationText
from llmopt.pipeline.journal import PartJournal
from llmopt.pipeline.parts import PartReader
from llmopt.pipeline.verify import References, Verification, verify
from llmopt.pipeline.windows import verification_windows
from llmopt.progress import Progress
from llmopt.quantize.assign import Assignment
from llmopt.quantize.fold import Fold
from llmopt.quantize.method import Method
from llmopt.report.results import LayerResult

FORMAT = "onnx"


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
    journal: Journal | None = None  # of a calibrated method: where finished parts are kept

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return self.source.spec


def export(job: Export, folder: Path, progress: Progress) -> tuple[tuple[LayerResult, ...], Verification]:
    """Write graph, data, configs and tokenizer into `folder`; gives each layer's result and how well they agree.

    Raises:
        LlmoptError: the weights are damaged, or the graph does not compute what the quantized model computes.
    """
    import torch  # noqa: PLC0415 (late: a mistake in a request should not wait for it)

    torch.set_num_threads(job.threads)
    write_companions(job.source, folder)
    windows = verification_windows(job.spec, folder, job.seed)
    references = References(job.spec, windows, rounds_activations=rounds_activations(job.assignments))
    calibration = None
    if job.calibration is not None:
        calibration = Calibration(job.spec, job.calibration.windows(job.spec, Tokenizer.from_folder(folder)))
    layers = write_graph(job, folder, references, progress, calibration)
    del calibration  # verification needs the memory
    return layers, verify(folder, references.exact, references.rounded, job.threads, progress)


def write_graph(
    job: Export, folder: Path, references: References, progress: Progress, calibration: Calibration | None = None
) -> tuple[LayerResult, ...]:
    """Stream the model part by part: read, quantize, write, run the references, forget."""
    spec = job.spec
    layers: list[LayerResult] = []
    journal = None
    if job.journal is not None and calibration is not None:
        journal = PartJournal(job.journal, job.assignments, calibration.windows, progress)
        journal.announce(spec)
    with (
        closing(DecoderGraph(folder, spec)) as graph,
        open_checkpoint(job.source) as checkpoint,
        progress.task(f"writing {job.source.name}", total=len(spec.blocks) + 2) as task,
    ):
        parts = PartReader(spec, checkpoint, job.assignments, job.method, calibration, folds=job.folds, journal=journal)
        embedding = parts.embedding()
        graph.embedding(embedding.weights)
        references.embedding(embedding.weights)
        layers += embedding.layers
        task.advance(note="embedding done")
        for block, part in zip(spec.blocks, parts.blocks(), strict=True):
            graph.block(block, part.weights)
            references.block(block, part.weights)
            layers += part.layers
            task.advance(note=f"block {block.index + 1} of {len(spec.blocks)} done")
        head = parts.head(embedding)
        graph.head(head.weights)
        references.head(head.weights)
        layers += head.layers
        graph.save(__version__)
        task.advance(note="head done")
    return tuple(layers)


def write_companions(source: ModelSource, folder: Path) -> None:
    """What lies beside the graph: configs, tokenizer, and what onnxruntime-genai wants to know."""
    source.write_tokenizer(folder)
    write_json(folder / CONFIG, source.config)
    if source.generation_config:
        write_json(folder / GENERATION_CONFIG, source.generation_config)
    config = genai_config(source.spec, source.generation_config, GRAPH_FILE)
    if config is not None:
        write_json(folder / GENAI_CONFIG, config)


def rounds_activations(assignments: Mapping[str, Assignment]) -> bool:
    """Whether any layer is to get 8-bit activations."""
    schemes = (item.scheme for item in assignments.values())
    return any(scheme is not None and scheme.activation_bits == 8 for scheme in schemes)


def estimated_bytes(spec: ModelSpec, assignments: Mapping[str, Assignment]) -> int:
    """What the model takes on disk under its layers' schemes, before any weight is read."""
    return quantized_bytes(spec, {name: item.scheme for name, item in assignments.items()})
