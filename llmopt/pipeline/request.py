"""What may be asked for, and what is wrong with it as far as the request alone says."""

from dataclasses import dataclass
from pathlib import Path

from llmopt.artifact import Resume
from llmopt.calibrate.load import TO_FIT, load_text
from llmopt.calibrate.text import built_in
from llmopt.errors import UsageError
from llmopt.pipeline.calibration import CALIBRATION_TOKENS, CalibrationText
from llmopt.pipeline.formats.onnx import ONNX
from llmopt.pipeline.ranks import Ranks
from llmopt.pipeline.tuning import KERNELS, MEASURED
from llmopt.precision.budget import Budget
from llmopt.progress import Progress
from llmopt.quantize.assign import Override
from llmopt.quantize.method import Method
from llmopt.quantize.registry import check_minutes, looks_at_inputs
from llmopt.quantize.scheme import Scheme


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
    minutes: float | None = None  # that quantizing may take, for method auto; None: all that it needs
    calib: str | Path | None = None  # text, or the name of a dataset; None: what comes with llmopt
    calib_tokens: int | None = None
    overrides: tuple[Override, ...] = ()
    ignore: tuple[str, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False
    format: str = ONNX.name
    kernels: str | None = None  # one of `KERNELS`; None: measured where the format leaves a choice
    seed: int = 0
    threads: int = 1
    force: bool = False
    resume: Resume = Resume.IF_SAME  # the journal of a calibrated method that was stopped


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


def kernels_of(request: QuantizeRequest) -> str | None:
    """How kernels are chosen; None for a format that says nothing of them.

    Raises:
        UsageError: there is no such way, or there is nothing to choose.
    """
    if request.kernels is not None and request.kernels not in KERNELS:
        raise UsageError(f"there are no {request.kernels!r} kernels", hint=f"--kernels {' or '.join(KERNELS)}")
    if request.format == ONNX.name:
        return request.kernels or MEASURED
    if request.kernels is not None:
        raise UsageError(
            f"an artifact of format {request.format} names no kernels: its engine chooses them",
            hint="leave --kernels out",
        )
    return None


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


def require_timely(request: QuantizeRequest) -> None:
    """See that its method can be done in more time or less, where a request gives some.

    Raises:
        UsageError: it cannot.
    """
    check_minutes(request.minutes, request.method)


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
