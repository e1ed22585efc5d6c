"""From a model to a quantized artifact that was held against what it should compute."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmopt import __version__
from llmopt.artifact import (
    MODEL_CARD,
    REPORT,
    Journal,
    Manifest,
    Resume,
    Source,
    check_destination,
    discard_journal,
    journal,
    staged,
    write_json,
    write_manifest,
)
from llmopt.calibrate.load import TO_FIT, load_text
from llmopt.calibrate.text import built_in
from llmopt.errors import UsageError
from llmopt.export.card import Card, card_text
from llmopt.measure.host import describe_host, versions
from llmopt.measure.size import model_bytes
from llmopt.model.source import ModelSource, open_source
from llmopt.pipeline.calibration import CALIBRATION_TOKENS, CalibrationText, require_tokens
from llmopt.pipeline.estimate import Estimate, Work
from llmopt.pipeline.export import Export, assist, export
from llmopt.pipeline.formats.base import Format
from llmopt.pipeline.formats.onnx import ONNX
from llmopt.pipeline.formats.registry import find_format
from llmopt.pipeline.heldout import HeldOutLoss
from llmopt.pipeline.journal import journal_key
from llmopt.pipeline.mixed import (
    ROUNDS,
    ExceededError,
    Mix,
    divided,
    fixed_layers,
    outcome_json,
    outcome_note,
    overhead_bytes,
    planned,
    require_float_activations,
)
from llmopt.pipeline.parts import fits_table
from llmopt.pipeline.ranks import ALONE, Ranks
from llmopt.pipeline.soundness import open_tokenizer, refuse_artifact, unknown_tensors_note
from llmopt.pipeline.spill import limit_bytes
from llmopt.pipeline.verify import Verification
from llmopt.precision.budget import Budget, SizeBudget
from llmopt.precision.groups import fused_groups
from llmopt.precision.plan import Plan, solve
from llmopt.progress import Progress, Silent
from llmopt.quantize.assign import Assignment, Override, assign
from llmopt.quantize.fold import Fold
from llmopt.quantize.method import Method
from llmopt.quantize.registry import find_folds, find_method, looks_at_inputs
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import Scheme
from llmopt.report.results import Candidate, LayerResult, Measurement, Report

MIXED = "mixed"  # the scheme of an artifact in which a budget chose that of every layer


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """What to quantize, how, and where to. Everything in it can be checked before a weight is read.

    With a `budget` each layer that no pattern names gets the scheme that the budget is best spent on; of `scheme` only
    what it says of activations counts then.
    """

    model: str
    output: Path
    scheme: Scheme
    budget: Budget | None = None
    method: str = "rtn"
    calib: str | Path | None = (
        None  # text, or a dataset's name, for a budget, or a method that needs inputs; None: what comes with llmopt
    )
    calib_tokens: int | None = None
    overrides: tuple[Override, ...] = ()
    ignore: tuple[str, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False
    format: str = ONNX.name
    seed: int = 0
    threads: int = 1
    force: bool = False
    resume: Resume = Resume.IF_SAME  # the journal of a calibrated method that was stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request whose model was found and whose layers have their schemes: all that a dry run needs."""

    request: QuantizeRequest
    source: ModelSource
    format: Format
    method: Method
    folds: tuple[Fold, ...]
    assignments: Mapping[str, Assignment]
    calibration: CalibrationText | None
    mix: Mix | None = None  # for a request with a budget
    plan: Plan | None = None  # once it was made; the assignments are then its own
    notes: tuple[str, ...] = ()  # about the model
    tokens: int | None = None  # that this process calibrates on, for a method that looks at inputs

    @property
    def estimated_bytes(self) -> int:
        """What the weights will take on disk; at most, as long as a budget has no plan."""
        if self.plan is None and isinstance(self.request.budget, SizeBudget):
            return self.request.budget.model_bytes
        return self.format.estimated_bytes(self.source.spec, self.assignments)

    def method_of(self, layer: str) -> str:
        """What finds a layer's numbers; a table is never folded, and fitted only where it is the head too."""
        spec = self.source.spec
        if layer != spec.embedding.name and not (spec.tied and layer == spec.head.name):
            return self.request.method
        rounded = self.method.needs_inputs and not fits_table(spec, self.assignments[layer].scheme, self.method)
        return Rtn.name if rounded else self.method.name

    def require_room(self) -> Estimate:
        """See that memory and disk suffice; gives what is needed of both, once a budget has its plan.

        Raises:
            ResourceError: they do not.
        """
        work = Work(
            spec=self.source.spec,
            assignments=self.assignments,
            format=self.format,
            tokens=self.tokens,
            folds=bool(self.folds),
            limit_bytes=limit_bytes(),
        )
        needed = work.estimate(self.estimated_bytes + overhead_bytes(self.source.spec))
        needed.require_room(self.request.output)
        return needed

    def manifest(self) -> Manifest:
        """The manifest without its files; its key says whether an artifact is the one that this would write."""
        request = self.request
        return Manifest(
            source=source_entry(self.source),
            format=self.format.name,
            scheme=request.scheme.name if request.budget is None else MIXED,
            budget=None if request.budget is None else str(request.budget),
            method=request.method,
            calibration=None if self.calibration is None else self.calibration.entry(),
            overrides={pattern: scheme.name for pattern, scheme in request.overrides},
            ignore=request.ignore,
            seed=request.seed,
            versions={"llmopt": __version__, **versions()},
        )


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


def prepare(request: QuantizeRequest, progress: Progress, ranks: Ranks = ALONE) -> Prepared:
    """Find the model and decide what each layer gets, without reading a weight.

    Raises:
        LlmoptError: the model is not there, not supported, or lacks a tensor or its tokenizer; a pattern is wrong; or
            there is too little text to calibrate on.
    """
    refuse_artifact(request.model)
    format_, folds = find_format(request.format), find_folds(request.method)
    require_measurable(request)
    require_journal(request)
    require_spreadable(request, ranks)
    source = open_source(
        request.model, revision=request.revision, trust_remote_code=request.trust_remote_code, progress=progress
    )
    format_.check(source.spec)
    method = find_method(request.method, format_.scales(source.spec))
    assignments = assign(source.spec, request.scheme, request.overrides, request.ignore, format_.tables)
    format_.check_layers(source.spec, assignments)
    calibration = calibration_text(request, method, progress)
    tokenizer, tokens = open_tokenizer(source), None
    if calibration is not None and looks_at_inputs(request.method):
        tokens = require_tokens(source.spec, calibration.windows(source.spec, tokenizer), ranks) // ranks.size
    note = unknown_tensors_note(source)
    mix = None
    if request.budget is not None:
        assert calibration is not None
        require_float_activations(request.scheme)
        calibration, held_out = divided(calibration)
        mix = Mix(
            source=source,
            budget=request.budget,
            groups=fused_groups(source.spec, fixed_layers(source.spec, assignments, request.overrides, request.ignore)),
            fitted=calibration.corpus,
            held_out=held_out,
            method=method.name,
            seed=request.seed,
            threads=request.threads,
        )
        mix.require_reachable()
    return Prepared(
        request=request,
        source=source,
        format=format_,
        method=method,
        folds=folds,
        assignments=assignments,
        calibration=calibration,
        mix=mix,
        notes=() if note is None else (note,),
        tokens=tokens,
    )


def require_measurable(request: QuantizeRequest) -> None:
    """See that what a budget chose could be held against it, which is done in onnxruntime.

    Raises:
        UsageError: it could not.
    """
    if request.budget is not None and request.format != ONNX.name:
        raise UsageError(
            f"a budget is for {ONNX.name}: its sizes are that format's, and what was lost is measured in onnxruntime",
            hint=f"leave --budget or --format {request.format} out",
        )


def require_journal(request: QuantizeRequest) -> None:
    """See that there can be something to go on from, where a request insists on it.

    Raises:
        UsageError: its method keeps no journal.
    """
    if request.resume is Resume.REQUIRED and not looks_at_inputs(request.method):
        raise UsageError(f"method {request.method} takes seconds, and keeps no journal", hint="leave --resume out")


def require_spreadable(request: QuantizeRequest, ranks: Ranks) -> None:
    """See that there is work for several processes.

    Raises:
        UsageError: there is not, and there are several.
    """
    if ranks.size > 1 and not looks_at_inputs(request.method):
        raise UsageError(
            f"method {request.method} reads no text that {ranks.size} processes could divide among them",
            hint="run it without torchrun, or take another method: --method gptq",
        )


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


def calibration_text(request: QuantizeRequest, method: Method, progress: Progress) -> CalibrationText | None:
    """What a budget, or a method that needs inputs, is given to read.

    Raises:
        UsageError: text is given where none is read, or is not there.
        DataError: a dataset cannot be fetched, or holds no text.
    """
    if not looks_at_inputs(request.method) and request.budget is None:
        if request.calib is not None or request.calib_tokens is not None:
            raise UsageError(
                f"method {method.name} looks at the weights alone: it reads no text",
                hint="leave --calib out, or take another method",
            )
        return None
    corpus = built_in("calibration") if request.calib is None else load_text(request.calib, TO_FIT, progress)
    return CalibrationText(corpus=corpus, tokens=request.calib_tokens or CALIBRATION_TOKENS)


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
    if prepared.mix is None:
        return write(prepared, kept, progress, ranks)
    prepared = with_plan(prepared, progress, ranks)
    for _ in range(ROUNDS - 1):
        try:
            return write(prepared, kept, progress, ranks)
        except ExceededError as exceeded:
            assert prepared.plan is not None
            progress.say(f"{exceeded.what}: once more, with what was learnt")
            plan, correction = prepared.plan, exceeded.correction
            prepared = _planned(prepared, ranks.of_first(partial(solve, plan.problem, plan.budget, correction)))
    return write(prepared, kept, progress, ranks)


def with_plan(prepared: Prepared, progress: Progress, ranks: Ranks = ALONE) -> Prepared:
    """The same with the schemes that its budget is best spent on, which takes reading all weights.

    Raises:
        LlmoptError: the weights are damaged, or nothing is within the budget.
    """
    mix = prepared.mix
    return prepared if mix is None else _planned(prepared, ranks.of_first(lambda: mix.plan(progress)))


def _planned(prepared: Prepared, plan: Plan) -> Prepared:
    return dataclasses.replace(prepared, plan=plan, assignments=planned(prepared.assignments, plan))


def write(prepared: Prepared, kept: Journal | None, progress: Progress, ranks: Ranks) -> QuantizeResult:
    """Write an artifact with the schemes that are assigned; finished parts are kept in a journal.

    Raises:
        LlmoptError: see `quantize`.
    """
    job = _export(prepared, kept, ranks)
    if not ranks.is_first:
        assist(job)

    def outcome() -> QuantizeResult | ExceededError:
        try:
            return _written(prepared, job, progress)
        except ExceededError as exceeded:
            return exceeded

    found = ranks.of_first(outcome)
    if isinstance(found, ExceededError):
        raise found
    return found


def _export(prepared: Prepared, kept: Journal | None, ranks: Ranks) -> Export:
    request = prepared.request
    return Export(
        source=prepared.source,
        assignments=prepared.assignments,
        method=prepared.method,
        seed=request.seed,
        threads=request.threads,
        calibration=prepared.calibration if looks_at_inputs(request.method) else None,
        folds=prepared.folds,
        format=prepared.format,
        journal=kept,
        ranks=ranks,
    )


def _written(prepared: Prepared, job: Export, progress: Progress) -> QuantizeResult:
    request = prepared.request
    needed = prepared.require_room()
    progress.say(f"{request.output.name} {needed}")
    with staged(request.output, force=request.force) as folder:
        layers, verification = export(job, folder, progress)
        loss = None
        if prepared.mix is not None and prepared.plan is not None:
            loss = prepared.mix.check(prepared.plan, folder, progress)
        manifest = write_manifest(folder, prepared.manifest())
        size_bytes = model_bytes(folder)
        assert size_bytes is not None
        report = describe(prepared, size_bytes, layers, verification, loss)
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


def source_entry(source: ModelSource) -> Source:
    """The source as a manifest names it: a local one by its last name, for paths mean nothing elsewhere."""
    name = source.name if source.revision is not None else Path(source.name).name
    return Source(name=name, revision=source.revision, fingerprint=source.fingerprint())


def describe(
    prepared: Prepared,
    size_bytes: int,
    layers: tuple[LayerResult, ...],
    verification: Verification,
    loss: HeldOutLoss | None = None,
) -> Report:
    """The report of an artifact that was not benched yet: its size, its layers, and how well the export agrees."""
    request = prepared.request
    candidate = Candidate(
        name=request.output.name,
        engine=prepared.format.engine,
        scheme=prepared.manifest().scheme,
        method=request.method,
        metrics={"size_bytes": Measurement(value=size_bytes, n=1, unit="bytes")},
        layers=layers,
    )
    settings: dict[str, Any] = {"verification": dataclasses.asdict(verification)}
    notes = list(prepared.notes)
    if prepared.calibration is not None:
        settings["calibration"] = prepared.calibration.entry()
        if request.calib is None:
            notes.append("calibrated on llmopt's own stories: --calib with text like what it will read is better")
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
