"""From a model to a quantized artifact that was held against what it should compute."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmopt.artifact import (
    MODEL_CARD,
    REPORT,
    Journal,
    Manifest,
    check_destination,
    discard_journal,
    journal,
    staged,
    write_json,
    write_manifest,
)
from llmopt.errors import UsageError
from llmopt.export.card import Card, card_text
from llmopt.measure.host import describe_host, versions
from llmopt.measure.size import model_bytes
from llmopt.pipeline.basis import Basis
from llmopt.pipeline.cast_rest import rest_layers, rest_notes, rest_plan, with_rest
from llmopt.pipeline.estimate import Estimate
from llmopt.pipeline.export import Export, assist, export
from llmopt.pipeline.formats.hf import Hf
from llmopt.pipeline.formats.onnx import ONNX, Onnx
from llmopt.pipeline.heldout import HeldOutLoss
from llmopt.pipeline.journal import journal_key
from llmopt.pipeline.mixed import (
    ROUNDS,
    ExceededError,
    outcome_json,
    outcome_note,
)
from llmopt.pipeline.pace import Pace, time_notes
from llmopt.pipeline.prepare import Prepared, prepare, replanned, with_plan
from llmopt.pipeline.qat.division import divides
from llmopt.pipeline.ranks import ALONE, Ranks
from llmopt.pipeline.repair import notes_on
from llmopt.pipeline.request import QuantizeRequest
from llmopt.pipeline.tuning import Tuning
from llmopt.pipeline.turning import chosen_basis
from llmopt.pipeline.verify import Verification
from llmopt.precision.plan import Plan, solve
from llmopt.progress import Progress, Silent
from llmopt.quantize.registry import looks_at_inputs
from llmopt.report.results import Candidate, LayerResult, Measurement, Report


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """The artifact, its report, how far its graph is from the quantized model in torch, and the plan of a budget.

    `needed` is what was predicted that it would take.
    """

    path: Path
    manifest: Manifest
    report: Report
    verification: Verification
    needed: Estimate
    plan: Plan | None = None


def require_same_work(manifest: Manifest, ranks: Ranks) -> None:
    """See that all processes are about to write the same.

    Raises:
        UsageError: their models, texts, options or versions differ.
    """
    keys = ranks.gather(manifest.key)
    other = next((rank for rank, key in enumerate(keys) if key != keys[0]), None)
    if other is not None:
        raise UsageError(
            f"process {other} has another model, text, version of a library or option than process 0",
            hint="give all machines the same",
        )


def quantize(request: QuantizeRequest, progress: Progress | None = None, ranks: Ranks = ALONE) -> QuantizeResult:
    """Quantize a model into an artifact folder, which appears whole or not at all.

    Of several processes each has to call this; the first of them writes, and all get the result.

    Raises:
        LlmoptError: the output may not be written; see `prepare`; or the weights are damaged, the disk is full, or the
            export does not compute what the quantized model computes.
    """
    progress = progress or Silent()
    if ranks.is_first:
        check_destination(request.output, force=request.force)
    return execute(prepare(request, progress, ranks), progress, ranks)


def execute(prepared: Prepared, progress: Progress, ranks: Ranks = ALONE) -> QuantizeResult:
    """Do what was prepared, from where an earlier run of the same was stopped.

    Raises:
        LlmoptError: see `quantize`.
    """
    request = prepared.request
    if not looks_at_inputs(request.method):
        discard_journal(request.output, progress)
        return write_within_budget(prepared, None, progress, ranks)
    manifest = prepared.manifest()
    require_same_work(manifest, ranks)
    key = journal_key(manifest, request.threads, ranks)
    if not ranks.is_first:
        return write_within_budget(prepared, None, progress, ranks)
    with journal(request.output, key, request.resume, progress) as kept:
        return write_within_budget(prepared, kept, progress, ranks)


def write_within_budget(prepared: Prepared, kept: Journal | None, progress: Progress, ranks: Ranks) -> QuantizeResult:
    """Write an artifact; under a budget, again with what was learnt, where one was not within it."""
    pace = Pace(prepared.request.minutes)
    if prepared.mix is None:
        return write(prepared, kept, progress, ranks, pace)
    prepared = with_plan(prepared, progress, ranks)
    for _ in range(ROUNDS - 1):
        try:
            return write(prepared, kept, progress, ranks, pace)
        except ExceededError as exceeded:
            assert prepared.plan is not None
            progress.say(f"{exceeded.what}: once more, with what was learnt")
            plan, correction = prepared.plan, exceeded.correction
            prepared = replanned(prepared, ranks.of_first(partial(solve, plan.problem, plan.budget, correction)))
    return write(prepared, kept, progress, ranks, pace)


def write(prepared: Prepared, kept: Journal | None, progress: Progress, ranks: Ranks, pace: Pace) -> QuantizeResult:
    """Write an artifact with the schemes that are assigned; finished parts are kept in a journal.

    Raises:
        LlmoptError: see `quantize`.
    """
    if prepared.training is not None:
        prepared.training.divided = ranks.of_first(partial(divides, prepared, progress))
    needed = prepared.require_room() if ranks.is_first else None
    basis = ranks.of_first(partial(chosen_basis, prepared, kept, progress))
    turn = None if basis is None else basis.seed
    prepared = with_rest(prepared, ranks.of_first(partial(rest_plan, prepared, kept, progress)))
    tuning = prepared.tuning(kept, progress) if ranks.is_first else None
    job = dataclasses.replace(_export(prepared, kept, ranks, pace, tuning), turn=turn)
    if not ranks.is_first:
        assist(job)

    def outcome() -> QuantizeResult | ExceededError:
        assert needed is not None
        try:
            return _written(prepared, job, needed, progress, basis=basis, tuning=tuning)
        except ExceededError as exceeded:
            return exceeded

    found = ranks.of_first(outcome)
    if isinstance(found, ExceededError):
        raise found
    return found


def _export(prepared: Prepared, kept: Journal | None, ranks: Ranks, pace: Pace, tuning: Tuning | None) -> Export:
    request = prepared.request
    return Export(
        source=prepared.source,
        assignments=prepared.assignments,
        method=prepared.method,
        seed=request.seed,
        threads=request.threads,
        calibration=prepared.calibration if looks_at_inputs(request.method) else None,
        folds=prepared.folds,
        format=prepared.format if tuning is None else Onnx(tuning=tuning),
        journal=kept,
        ranks=ranks,
        pace=pace,
        training=prepared.training,
    )


def _written(
    prepared: Prepared,
    job: Export,
    needed: Estimate,
    progress: Progress,
    *,
    basis: Basis | None,
    tuning: Tuning | None,
) -> QuantizeResult:
    request = prepared.request
    progress.say(f"{request.output.name} {needed}")
    with staged(request.output, force=request.force) as folder:
        layers, verification = export(job, folder, progress)
        loss = None
        if prepared.mix is not None and prepared.plan is not None:
            loss = prepared.mix.check(prepared.plan, folder, progress)
        chosen = {} if tuning is None else tuning.chosen()
        manifest = write_manifest(folder, dataclasses.replace(prepared.manifest(), tuning=chosen))
        size_bytes = model_bytes(folder)
        assert size_bytes is not None
        report = describe(prepared, size_bytes, layers, verification, loss=loss, basis=basis, tuning=tuning)
        notes = time_notes(job.pace, prepared.source.spec.blocks, layers) if job.training is None else []
        report = dataclasses.replace(report, notes=(*report.notes, *notes))
        write_json(folder / REPORT, report.to_json())
        card = card_text(Card.of(manifest, prepared.source.config, report))
        (folder / MODEL_CARD).write_text(card, encoding="utf-8", newline="\n")
    return QuantizeResult(
        path=request.output,
        manifest=manifest,
        report=report,
        verification=verification,
        needed=needed,
        plan=prepared.plan,
    )


def describe(
    prepared: Prepared,
    size_bytes: int,
    layers: tuple[LayerResult, ...],
    verification: Verification,
    *,
    loss: HeldOutLoss | None = None,
    basis: Basis | None = None,
    tuning: Tuning | None = None,
) -> Report:
    """The report of an artifact that was not benched yet: its size, its layers, and how well the export agrees."""
    request = prepared.request
    rest = prepared.format.plan if isinstance(prepared.format, Hf) else None
    candidate = Candidate(
        name=request.output.name,
        engine=prepared.format.engine,
        scheme=prepared.manifest().scheme,
        method=request.method,
        metrics={"size_bytes": Measurement(value=size_bytes, n=1, unit="bytes")},
        layers=rest_layers(layers, rest),
    )
    settings: dict[str, Any] = {"verification": dataclasses.asdict(verification)}
    notes = [*prepared.notes, *notes_on(verification.activations), *rest_notes(rest)]
    if prepared.calibration is not None:
        settings["calibration"] = prepared.calibration.entry()
        if request.calib is None:
            notes.append("calibrated on llmopt's own stories: --calib with text like what it will read is better")
    if prepared.training is not None and prepared.training.trained is not None:
        settings["training"] = {**prepared.training.entry(), **prepared.training.trained.to_json()}
        notes += prepared.training.trained.notes()
    if basis is not None:
        settings["basis"] = basis.to_json()
        notes.append(basis.note)
    if tuning is not None:
        settings["kernels"] = tuning.to_json()
    if prepared.plan is not None and loss is not None:
        settings["budget"] = outcome_json(prepared.plan, loss)
        notes.append(outcome_note(prepared.plan, loss))
    if prepared.format is ONNX and prepared.source.spec.genai_type is None:
        notes.append("onnxruntime-genai does not know this family: there is no genai_config.json")
    return Report(
        host=describe_host(request.threads),
        versions=versions(),
        seed=request.seed,
        baseline=None,
        candidates=(candidate,),
        settings=settings,
        notes=tuple(notes),
    )
