"""A request made ready: its model found, its layers given their schemes. Only the plan of a budget reads weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmopt import __version__
from llmopt.artifact import Journal, Manifest, Source
from llmopt.measure.host import versions
from llmopt.model.source import ModelSource, open_source
from llmopt.model.spec import ModelSpec
from llmopt.model.turned import turned_spec
from llmopt.pipeline.basis import NOT_TURNED, why_not
from llmopt.pipeline.calibration_text import CalibrationText, require_tokens
from llmopt.pipeline.estimate import Estimate, Work
from llmopt.pipeline.formats.base import Assignments, Format
from llmopt.pipeline.formats.hf import HF
from llmopt.pipeline.formats.registry import find_format
from llmopt.pipeline.mixed import (
    Mix,
    divided,
    fixed_layers,
    overhead_bytes,
    planned,
    require_float_activations,
)
from llmopt.pipeline.parts import fits_table
from llmopt.pipeline.qat.options import QatOptions
from llmopt.pipeline.qat.training import Training
from llmopt.pipeline.ranks import ALONE, Ranks, place
from llmopt.pipeline.request import (
    QuantizeRequest,
    calibration_text,
    kernels_of,
    require_castable,
    require_journal,
    require_measurable,
    require_spreadable,
    require_timely,
    require_trainable,
    training_corpus,
)
from llmopt.pipeline.soundness import open_tokenizer, refuse_artifact, unknown_tensors_note
from llmopt.pipeline.spill import limit_bytes
from llmopt.pipeline.tuning import DEFAULT, MEASURED, Tuning, measured_on, tuning
from llmopt.precision.budget import SizeBudget
from llmopt.precision.groups import fused_groups
from llmopt.precision.plan import Plan
from llmopt.progress import Progress
from llmopt.quantize.assign import Assignment, assign
from llmopt.quantize.fold import Fold
from llmopt.quantize.method import Method
from llmopt.quantize.registry import find_folds, find_method, looks_at_inputs
from llmopt.quantize.rotate import Rotate
from llmopt.quantize.rtn import Rtn

MIXED = "mixed"  # the scheme of an artifact in which a budget chose that of every layer


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
    kernels: str | None = None  # how they are chosen, and on what machine
    mix: Mix | None = None  # for a request with a budget
    plan: Plan | None = None  # once it was made; the assignments are then its own
    notes: tuple[str, ...] = ()  # about the model
    rotate: Rotate | None = None  # that is to be tried on the residual stream
    tokens: int | None = None  # that this process calibrates on, for a method that looks at inputs
    training: Training | None = None  # of what the method has quantized

    @property
    def largest_spec(self) -> ModelSpec:
        """What is written, with the product before the head that it may turn out to have."""
        return self.source.spec if self.rotate is None else turned_spec(self.source.spec)

    @property
    def estimated_bytes(self) -> int:
        """What the weights will take on disk; at most, as long as a budget has no plan."""
        if self.plan is None and isinstance(self.request.budget, SizeBudget):
            return self.request.budget.model_bytes
        return self.format.estimated_bytes(self.largest_spec, self.assignments)

    def method_of(self, layer: str) -> str:
        """What finds a layer's numbers; a table is never folded, and fitted only where it is the head too."""
        spec = self.source.spec
        if layer != spec.embedding.name and not (spec.tied and layer == spec.head.name):
            return self.request.method
        rounded = self.method.needs_inputs and not fits_table(spec, self.assignments[layer].scheme, self.method)
        return Rtn.name if rounded else self.method.name

    def tuning(self, journal: Journal | None, progress: Progress) -> Tuning | None:
        """What chooses kernels, where they are measured."""
        return None if self.kernels in (None, DEFAULT) else tuning(self.request.threads, journal, progress)

    def require_room(self) -> Estimate:
        """See that memory and disk suffice; gives what is needed of both, once a budget has its plan.

        Raises:
            ResourceError: they do not.
        """
        needed = self.needed()
        needed.require_room(self.request.output)
        return needed

    def needed(self, sharing: int | None = None) -> Estimate:
        """Memory and disk, with what training takes divided among so many processes; None: as was decided."""
        divided = self.training is not None and self.training.divided
        work = Work(
            spec=self.largest_spec,
            assignments=self.assignments,
            format=self.format,
            tokens=self.tokens,
            folds=bool(self.folds),
            limit_bytes=limit_bytes(),
            refits=self.method.refits_blocks,
            candidates=max(1, len(self.method.candidates)),
            training=None if self.training is None else self.training.options,
            sharing=sharing or (place()[1] if divided else 1),
        )
        return work.estimate(self.estimated_bytes + overhead_bytes(self.source.spec))

    def manifest(self) -> Manifest:
        """The manifest without its files; its key says whether an artifact is the one that this would write."""
        request = self.request
        return Manifest(
            source=source_entry(self.source),
            format=self.format.name,
            scheme=request.scheme.name if request.budget is None else MIXED,
            budget=None if request.budget is None else str(request.budget),
            method=request.method,
            minutes=request.minutes,
            calibration=None if self.calibration is None else self.calibration.entry(),
            training=None if self.training is None else self.training.entry(),
            overrides={pattern: scheme.name for pattern, scheme in request.overrides},
            ignore=request.ignore,
            seed=request.seed,
            kernels=self.kernels,
            cast=request.cast,
            versions={"llmopt": __version__, **versions()},
        )


def prepare(request: QuantizeRequest, progress: Progress, ranks: Ranks = ALONE) -> Prepared:
    """Find the model and decide what each layer gets, without reading a weight.

    Raises:
        LlmoptError: the model is not there, not supported, or lacks a tensor or its tokenizer; a pattern is wrong; or
            there is too little text to calibrate on.
    """
    refuse_artifact(request.model)
    require_castable(request)
    format_, folds = find_format(request.format), find_folds(request.method)
    if request.cast is not None:
        format_ = dataclasses.replace(HF, cast=request.cast)
    kernels = kernels_of(request.kernels, request.format)
    require_measurable(request)
    require_journal(request)
    require_spreadable(request, ranks)
    require_timely(request)
    require_trainable(request)
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
        windows, holds_out = calibration.windows(source.spec, tokenizer), bool(method.candidates)
        tokens = require_tokens(source.spec, windows, ranks, holds_out=holds_out) // ranks.size
    note = unknown_tensors_note(source)
    training = training_of(request, progress)
    rotate, notes = of_stream(folds, source.spec, format_, assignments)
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
            overhead_bytes=overhead_bytes(source.spec if rotate is None else turned_spec(source.spec)),
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
        kernels=ranks.of_first(lambda: measured_on(request.threads)) if kernels == MEASURED else kernels,
        mix=mix,
        notes=notes if note is None else (note, *notes),
        rotate=rotate,
        tokens=tokens,
        training=training,
    )


def training_of(request: QuantizeRequest, progress: Progress) -> Training | None:
    """What a method that trains is to do.

    Raises:
        LlmoptError: its text is not there.
    """
    corpus = training_corpus(request, progress)
    return None if corpus is None else Training(options=request.training or QatOptions(), corpus=corpus)


def of_stream(
    folds: Sequence[Fold], spec: ModelSpec, format_: Format, assignments: Assignments
) -> tuple[Rotate | None, tuple[str, ...]]:
    """The fold that is to be tried on the residual stream, if one was asked for; or a note why it is not."""
    rotate = next((fold for fold in folds if isinstance(fold, Rotate)), None)
    reason = None if rotate is None else why_not(spec, format_, assignments)
    return (rotate, ()) if reason is None else (None, (f"{NOT_TURNED}: {reason}",))


def with_plan(prepared: Prepared, progress: Progress, ranks: Ranks = ALONE) -> Prepared:
    """The same with the schemes that its budget is best spent on, which takes reading all weights.

    Raises:
        LlmoptError: the weights are damaged, or nothing is within the budget.
    """
    mix = prepared.mix
    return prepared if mix is None else replanned(prepared, ranks.of_first(lambda: mix.plan(progress)))


def replanned(prepared: Prepared, plan: Plan) -> Prepared:
    """The same with the schemes of a plan."""
    return dataclasses.replace(prepared, plan=plan, assignments=planned(prepared.assignments, plan))


def source_entry(source: ModelSource) -> Source:
    """The source as a manifest names it: a local one by its last name, for paths mean nothing elsewhere."""
    name = source.name if source.revision is not None else Path(source.name).name
    return Source(name=name, revision=source.revision, fingerprint=source.fingerprint())
