"""From a model to an artifact: read, quantize, write and verify, one block in memory at a time."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt import __version__
from llmopt.artifact import (
    MODEL_CARD,
    REPORT,
    Manifest,
    Source,
    check_destination,
    check_free_disk,
    staged,
    write_json,
    write_manifest,
)
from llmopt.export.card import Card, card_text
from llmopt.export.genai import GENAI_CONFIG, genai_config
from llmopt.export.onnx.decoder import DecoderGraph
from llmopt.export.onnx.graph import DATA_FILE, GRAPH_FILE
from llmopt.measure.host import describe_host, versions
from llmopt.model.checkpoint import Checkpoint, open_checkpoint
from llmopt.model.source import CONFIG, GENERATION_CONFIG, ModelSource, open_source
from llmopt.model.spec import ModelSpec
from llmopt.model.storage import stored_bytes
from llmopt.pipeline.parts import PartReader
from llmopt.pipeline.verify import Reference, Verification, verify
from llmopt.pipeline.windows import verification_windows
from llmopt.progress import Progress, Silent, Task
from llmopt.quantize.assign import Assignment, Override, assign
from llmopt.quantize.method import Method
from llmopt.quantize.registry import find_method
from llmopt.quantize.scheme import Scheme
from llmopt.report.results import Candidate, LayerResult, Measurement, Report

FORMAT = "onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """What to quantize, how, and where to. Everything in it can be checked before a model is opened."""

    model: str
    output: Path
    scheme: Scheme
    method: str = "rtn"
    overrides: tuple[Override, ...] = ()
    ignore: tuple[str, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    threads: int = 1
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """The artifact and its report. `verification` says how far the graph is from the quantized model in torch."""

    path: Path
    manifest: Manifest
    report: Report
    verification: Verification


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request whose model was found and whose layers have their schemes: all that `--dry-run` needs."""

    request: QuantizeRequest
    source: ModelSource
    method: Method
    assignments: Mapping[str, Assignment]

    def manifest(self) -> Manifest:
        """The manifest without its files; its key is the artifact's content hash."""
        request = self.request
        return Manifest(
            source=Source(
                name=Path(request.model).name if Path(request.model).exists() else request.model,
                revision=self.source.revision,
                fingerprint=self.source.fingerprint(),
            ),
            format=FORMAT,
            scheme=request.scheme.name,
            method=self.method.name,
            overrides={pattern: scheme.name for pattern, scheme in request.overrides},
            ignore=request.ignore,
            seed=request.seed,
            versions={"llmopt": __version__, **versions()},
        )


def prepare(request: QuantizeRequest, progress: Progress) -> Prepared:
    """Find the model and decide what each layer gets, without reading a weight.

    Raises:
        LlmoptError: the output may not be written, the model is not there or not supported, or a pattern is wrong.
    """
    check_destination(request.output, force=request.force)
    method = find_method(request.method)
    source = open_source(
        request.model, revision=request.revision, trust_remote_code=request.trust_remote_code, progress=progress
    )
    assignments = assign(source.spec, request.scheme, request.overrides, request.ignore)
    return Prepared(request=request, source=source, method=method, assignments=assignments)


def quantize(request: QuantizeRequest, progress: Progress | None = None) -> QuantizeResult:
    """Quantize a model into an artifact folder, which appears whole or not at all.

    Raises:
        LlmoptError: see `prepare`; or the weights are damaged, the disk is full, or the export does not compute what
            the quantized model computes.
    """
    progress = progress or Silent()
    return execute(prepare(request, progress), progress)


def execute(prepared: Prepared, progress: Progress) -> QuantizeResult:
    """Do what was prepared."""
    import torch  # noqa: PLC0415 (late: a mistake in the request costs no two seconds)

    request, source = prepared.request, prepared.source
    torch.set_num_threads(request.threads)
    check_free_disk(request.output.parent, estimated_bytes(source.spec, prepared.assignments))
    with staged(request.output, force=request.force) as folder, open_checkpoint(source) as checkpoint:
        write_companions(source, folder)
        reference = Reference(source.spec, verification_windows(source.spec, folder, request.seed))
        layers = write_graph(source.spec, checkpoint, prepared, folder, reference, progress)
        with progress.task("comparing the export with the quantized model"):
            verification = verify(folder, reference, request.threads)
        manifest = write_manifest(folder, prepared.manifest())
        report = describe(prepared, folder, layers, verification)
        write_json(folder / REPORT, report.to_json())
        (folder / MODEL_CARD).write_text(card_text(Card.of(manifest, source.config, report)), encoding="utf-8")
    return QuantizeResult(path=request.output, manifest=manifest, report=report, verification=verification)


def write_graph(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    prepared: Prepared,
    folder: Path,
    reference: Reference,
    progress: Progress,
) -> tuple[LayerResult, ...]:
    """Stream the model through the method into the graph and through the reference; gives each layer's result."""
    parts = PartReader(spec, checkpoint, prepared.assignments, prepared.method)
    graph = DecoderGraph(folder, spec)
    layers: list[LayerResult] = []
    with progress.task(f"quantizing {prepared.source.name}", total=len(spec.blocks) + 2) as task:
        embedding = parts.embedding()
        graph.embedding(embedding.weights)
        reference.embedding(embedding.weights)
        layers += embedding.layers
        step(task, "blocks")
        for block, part in zip(spec.blocks, parts.blocks(), strict=True):
            graph.block(block, part.weights)
            reference.block(block, part.weights)
            layers += part.layers
            step(task, f"block {block.index + 1} of {len(spec.blocks)}")
        head = parts.head(embedding)
        graph.head(head.weights)
        reference.head(head.weights)
        layers += head.layers
        graph.save(__version__)
        step(task, "done")
    return tuple(layers)


def step(task: Task, note: str) -> None:
    """One part is done."""
    task.advance(1, note)


def write_companions(source: ModelSource, folder: Path) -> None:
    """What lies beside the graph: configs, tokenizer, and what onnxruntime-genai wants to know."""
    source.write_tokenizer(folder)
    write_json(folder / CONFIG, source.config)
    if source.generation_config:
        write_json(folder / GENERATION_CONFIG, source.generation_config)
    config = genai_config(source.spec, source.generation_config, GRAPH_FILE)
    if config is not None:
        write_json(folder / GENAI_CONFIG, config)


def estimated_bytes(spec: ModelSpec, assignments: Mapping[str, Assignment]) -> int:
    """What the artifact takes on disk at least, in bytes: the weights under their schemes, the rest as float32."""
    total = 0
    matrices = {spec.embedding.name: next(spec.embedding.tensors()).shape}
    matrices |= {linear.name: linear.weight.shape for linear in spec.linears() if linear.tied_to is None}
    for name, (rows, columns) in matrices.items():
        scheme = assignments[name].scheme
        total += 4 * rows * columns if scheme is None else stored_bytes(rows, columns, scheme)
    return total


def describe(prepared: Prepared, folder: Path, layers: tuple[LayerResult, ...], verification: Verification) -> Report:
    """The report of an artifact that was not benched yet: its size, its layers, and how well the export agrees."""
    size = sum((folder / name).stat().st_size for name in (GRAPH_FILE, DATA_FILE))
    request = prepared.request
    candidate = Candidate(
        name=request.output.name,
        engine="onnxruntime",
        scheme=request.scheme.name,
        method=prepared.method.name,
        metrics={"size_bytes": Measurement(value=size, n=1, unit="bytes")},
        layers=layers,
    )
    settings: dict[str, Any] = {"verification": dataclasses.asdict(verification)}
    notes = [] if prepared.source.spec.genai_type else ["onnxruntime-genai does not know this family of models"]
    return Report(
        host=describe_host(request.threads),
        versions=versions(),
        seed=request.seed,
        baseline=None,
        candidates=(candidate,),
        settings=json.loads(json.dumps(settings)),
        notes=tuple(notes),
    )
