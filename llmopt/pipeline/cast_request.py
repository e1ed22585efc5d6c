"""What may be asked of a cast, and a request made ready: its model found, its text read. No weight is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmopt import __version__
from llmopt.artifact import Journal, Manifest, Resume
from llmopt.calibrate.load import TO_FIT, load_text
from llmopt.calibrate.text import built_in
from llmopt.engine.base import TokenIds
from llmopt.export.opening import CAST
from llmopt.measure.host import versions
from llmopt.model.source import ModelSource, open_source
from llmopt.pipeline.calibration_text import WINDOW, CalibrationText
from llmopt.pipeline.cast_estimate import estimate_cast
from llmopt.pipeline.estimate import Estimate
from llmopt.pipeline.formats.cast import CastFormat, find_cast_format
from llmopt.pipeline.formats.onnx import ONNX
from llmopt.pipeline.prepare import source_entry
from llmopt.pipeline.request import kernels_of
from llmopt.pipeline.soundness import open_tokenizer, refuse_artifact, unknown_tensors_note
from llmopt.pipeline.tuning import DEFAULT, MEASURED, Tuning, measured_on, tuning
from llmopt.precision.cast import CastPlan, require_patterns
from llmopt.precision.short import TOLERANCE, check_dtype, check_tolerance
from llmopt.progress import Progress

SCANNED_TOKENS = 8 * WINDOW


@dataclass(frozen=True, slots=True, kw_only=True)
class CastRequest:
    """What to cast to what, and where to: `dtype` is `fp16` or `bf16`, `tolerance` bounds a module's relative error."""

    model: str
    output: Path
    dtype: str
    tolerance: float = TOLERANCE
    keep_fp32: tuple[str, ...] = ()
    calib: str | Path | None = None  # text, or the name of a dataset; None: what comes with llmopt
    calib_tokens: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    format: str = ONNX.name
    kernels: str | None = None  # as of a QuantizeRequest; of a cast they decide the pieces of a prompt
    seed: int = 0
    threads: int = 1
    force: bool = False
    resume: Resume = Resume.IF_SAME


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedCast:
    """A request whose model and text were found."""

    request: CastRequest
    source: ModelSource
    format: CastFormat
    calibration: CalibrationText
    windows: Sequence[TokenIds]
    kernels: str | None = None  # how they are chosen, and on what machine
    notes: tuple[str, ...] = ()  # about the model

    def tuning(self, journal: Journal, progress: Progress) -> Tuning | None:
        """What chooses the pieces of a prompt, where they are measured."""
        return None if self.kernels in (None, DEFAULT) else tuning(self.request.threads, journal, progress)

    def bytes_of(self, plan: CastPlan | None) -> int:
        """What the weights take on disk; without a plan, if nothing is kept."""
        return self.format.estimated_bytes(self.source.spec, plan)

    @property
    def estimated_bytes(self) -> int:
        """What the weights take on disk if nothing is kept, before any is read."""
        return self.bytes_of(None)

    def require_room(self, plan: CastPlan | None = None) -> Estimate:
        """See that memory and disk suffice; gives what is needed of both.

        Raises:
            ResourceError: they do not.
        """
        needed = estimate_cast(self.source.spec, self.format, sum(map(len, self.windows)), self.bytes_of(plan))
        needed.require_room(self.request.output)
        return needed

    def manifest(self) -> Manifest:
        """The manifest without its files; its key says whether an artifact is the one that this would write."""
        request = self.request
        return Manifest(
            source=source_entry(self.source),
            format=self.format.name,
            scheme=request.dtype,
            method=CAST,
            calibration=self.calibration.entry(),
            tolerance=request.tolerance,
            keep_fp32=request.keep_fp32,
            seed=request.seed,
            kernels=self.kernels,
            versions={"llmopt": __version__, **versions()},
        )


def prepare_cast(request: CastRequest, progress: Progress) -> PreparedCast:
    """Find the model and the text, without reading a weight.

    Raises:
        LlmoptError: the model is not there, not supported, or lacks a tensor or its tokenizer; a pattern is wrong; or
            there is no text.
    """
    refuse_artifact(request.model)
    format_ = find_cast_format(request.format)
    check_dtype(request.dtype)
    check_tolerance(request.tolerance)
    kernels = kernels_of(request.kernels, request.format)
    source = open_source(
        request.model, revision=request.revision, trust_remote_code=request.trust_remote_code, progress=progress
    )
    format_.check(source.spec, request.dtype)
    require_patterns(source.spec, request.keep_fp32)
    corpus = built_in("calibration") if request.calib is None else load_text(request.calib, TO_FIT, progress)
    calibration = CalibrationText(corpus=corpus, tokens=request.calib_tokens or SCANNED_TOKENS)
    windows = calibration.windows(source.spec, open_tokenizer(source))
    note = unknown_tensors_note(source)
    return PreparedCast(
        request=request,
        source=source,
        format=format_,
        calibration=calibration,
        windows=windows,
        kernels=measured_on(request.threads) if kernels == MEASURED else kernels,
        notes=() if note is None else (note,),
    )
