"""From a model to one in 16 bits that keeps in float32 what these cannot hold."""

import dataclasses
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmopt.artifact import (
    MODEL_CARD,
    REPORT,
    Journal,
    Manifest,
    check_destination,
    journal,
    staged,
    write_json,
    write_manifest,
)
from llmopt.export.card import Card, card_text
from llmopt.export.opening import CAST
from llmopt.measure.host import describe_host, versions
from llmopt.measure.size import model_bytes
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.source import GENERATION_CONFIG
from llmopt.pipeline.cast_check import CastReferences
from llmopt.pipeline.cast_request import CastRequest, PreparedCast, prepare_cast
from llmopt.pipeline.estimate import Estimate
from llmopt.pipeline.formats.cast import unassigned
from llmopt.pipeline.journal import journal_key
from llmopt.pipeline.parts import PartReader
from llmopt.pipeline.scan import RANGES, ranges_from_bytes, ranges_to_bytes, scan
from llmopt.pipeline.tuning import Tuning
from llmopt.pipeline.verify import Verification
from llmopt.pipeline.windows import verification_windows
from llmopt.precision.cast import DTYPES, CastPlan, choose
from llmopt.progress import Progress, Silent
from llmopt.report.results import Candidate, Measurement, Report

OWN_TEXT = "scanned on llmopt's own stories: --calib with text like what it will read is better"
MIXED_CACHES = "attention of some blocks is float32: onnxruntime-genai, whose caches have one dtype, does not open it"


@dataclass(frozen=True, slots=True, kw_only=True)
class CastResult:
    """The artifact, its report, the dtype of each module, and how far it is from the same plan in torch."""

    path: Path
    manifest: Manifest
    report: Report
    verification: Verification
    needed: Estimate
    plan: CastPlan


def cast(request: CastRequest, progress: Progress | None = None) -> CastResult:
    """Cast a model into an artifact folder, which appears whole or not at all.

    Raises:
        LlmoptError: the output may not be written; see `prepare_cast`; or the weights are damaged, the disk is full,
            the model overflows float32, or the export does not compute what it should.
    """
    progress = progress or Silent()
    check_destination(request.output, force=request.force)
    return execute_cast(prepare_cast(request, progress), progress)


def execute_cast(prepared: PreparedCast, progress: Progress) -> CastResult:
    """Do what was prepared. What was scanned is kept in a journal until the artifact is whole.

    Raises:
        LlmoptError: see `cast`.
    """
    request = prepared.request
    prepared.require_room()
    key = journal_key(prepared.manifest(), request.threads)
    with journal(request.output, key, request.resume, progress) as kept:
        plan = plan_cast(prepared, progress, kept)
        return _written(prepared, plan, prepared.tuning(kept, progress), progress)


def plan_cast(prepared: PreparedCast, progress: Progress, kept: Journal | None = None) -> CastPlan:
    """The dtype of every module, which takes reading all weights once.

    Raises:
        LlmoptError: the weights are damaged, or the model overflows float32.
    """
    data = None if kept is None else kept.read(RANGES)
    if data is not None:
        progress.say("the ranges were scanned before: going on from there")
        ranges = ranges_from_bytes(data)
    else:
        request = prepared.request
        torch.set_num_threads(request.threads)
        folder = request.output.absolute().parent
        ranges = scan(prepared.source, prepared.windows, DTYPES[request.dtype], folder, progress)
        if kept is not None:
            kept.write(RANGES, ranges_to_bytes(ranges))
    request = prepared.request
    return choose(prepared.source.spec, ranges, request.dtype, tolerance=request.tolerance, keep_fp32=request.keep_fp32)


def _written(prepared: PreparedCast, plan: CastPlan, tuning: Tuning | None, progress: Progress) -> CastResult:
    request = prepared.request
    needed = prepared.require_room(plan)
    progress.say(f"{request.output.name} {needed}")
    with staged(request.output, force=request.force) as folder:
        verification = export_cast(prepared, plan, folder, progress)
        prepared.format.finish(prepared.source.spec, tuning, folder)
        chosen = {} if tuning is None else tuning.chosen()
        manifest = write_manifest(folder, dataclasses.replace(prepared.manifest(), tuning=chosen))
        size_bytes = model_bytes(folder)
        assert size_bytes is not None
        report = describe_cast(prepared, plan, size_bytes, verification, tuning)
        write_json(folder / REPORT, report.to_json())
        card = card_text(Card.of(manifest, prepared.source.config, report))
        (folder / MODEL_CARD).write_text(card, encoding="utf-8", newline="\n")
    return CastResult(
        path=request.output,
        manifest=manifest,
        report=report,
        verification=verification,
        needed=needed,
        plan=plan,
    )


def export_cast(prepared: PreparedCast, plan: CastPlan, folder: Path, progress: Progress) -> Verification:
    """Stream the model into its files and through the references beside them, then open what was written.

    Raises:
        LlmoptError: the weights are damaged, or the artifact does not compute what it should.
    """
    source, spec, format_ = prepared.source, prepared.source.spec, prepared.format
    source.write_tokenizer(folder)
    if source.generation_config:
        write_json(folder / GENERATION_CONFIG, source.generation_config)
    format_.write_companions(source, plan, folder)
    windows = verification_windows(spec, folder, prepared.request.seed)
    references = CastReferences(spec, windows, plan, short_tables=format_.short_tables)
    with (
        closing(format_.writer(spec, plan, folder)) as writer,
        open_checkpoint(source) as checkpoint,
        progress.task(f"writing {source.name}", total=len(spec.blocks) + 2) as task,
    ):
        parts = PartReader(spec, checkpoint, unassigned(spec), None)
        embedding = parts.embedding()
        references.embedding(writer.embedding(embedding.weights))
        task.advance(note="embedding done")
        for block, part in zip(spec.blocks, parts.blocks(), strict=True):
            references.block(block, writer.block(block, part.weights))
            task.advance(note=f"block {block.index + 1} of {len(spec.blocks)} done")
        references.head(writer.head(parts.head(embedding).weights))
        writer.save()
        task.advance(note="head done")
    return format_.verify(folder, references, plan, prepared.request.threads, progress)


def describe_cast(
    prepared: PreparedCast, plan: CastPlan, size_bytes: int, verification: Verification, tuning: Tuning | None
) -> Report:
    """The report of an artifact that was not benched yet."""
    request = prepared.request
    candidate = Candidate(
        name=request.output.name,
        engine=prepared.format.engine,
        scheme=request.dtype,
        method=CAST,
        metrics={"size_bytes": Measurement(value=size_bytes, n=1, unit="bytes")},
        layers=plan.layers(),
    )
    settings: dict[str, Any] = {
        "verification": dataclasses.asdict(verification),
        "calibration": prepared.calibration.entry(),
        "cast": {"tolerance": request.tolerance, "residual_from": plan.residual_from},
    }
    if tuning is not None:
        settings["kernels"] = tuning.to_json()
    return Report(
        host=describe_host(request.threads),
        versions=versions(),
        seed=request.seed,
        baseline=None,
        candidates=(candidate,),
        settings=settings,
        notes=(*prepared.notes, *cast_notes(prepared, plan)),
    )


def cast_notes(prepared: PreparedCast, plan: CastPlan) -> tuple[str, ...]:
    """What a person should know of a plan."""
    spec = prepared.source.spec
    notes = [f"{len(plan.kept)} of {len(plan.choices)} modules stay float32"]
    if plan.residual_from is not None:
        notes.append(f"the residual stream is float32 from {plan.residual_from} on")
    if prepared.request.calib is None:
        notes.append(OWN_TEXT)
    caches = {plan.dtype_of(block.attention.inputs[0].name) for block in spec.blocks}
    if prepared.format.name == "onnx" and len(caches) > 1:
        notes.append(MIXED_CACHES)
    return tuple(notes)
