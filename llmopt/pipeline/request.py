"""What may be asked for, and what is wrong with it as far as the request alone says."""

from dataclasses import dataclass
from pathlib import Path

from llmopt.artifact import Resume
from llmopt.calibrate.load import TO_FIT, load_text
from llmopt.calibrate.text import Corpus, built_in
from llmopt.errors import UsageError
from llmopt.pipeline.calibration_text import CALIBRATION_TOKENS, CalibrationText
from llmopt.pipeline.formats.hf import HF
from llmopt.pipeline.formats.onnx import ONNX
from llmopt.pipeline.qat.options import QatOptions
from llmopt.pipeline.ranks import Ranks, place
from llmopt.pipeline.tuning import KERNELS, MEASURED
from llmopt.precision.budget import Budget
from llmopt.precision.short import check_dtype
from llmopt.progress import Progress
from llmopt.quantize.assign import Override
from llmopt.quantize.method import Method
from llmopt.quantize.registry import TRAINED, check_minutes, looks_at_inputs, trains
from llmopt.quantize.scheme import Scheme

TRAINING_STORIES = 4000  # that come with llmopt, of about 100 tokens


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
    minutes: float | None = None  # that quantizing may take, for methods auto and qat; None: all that it needs
    training: QatOptions | None = None  # for method qat; None: its defaults
    calib: str | Path | None = None  # text, or the name of a dataset; None: what comes with llmopt
    calib_tokens: int | None = None
    overrides: tuple[Override, ...] = ()
    ignore: tuple[str, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False
    format: str = ONNX.name
    cast: str | None = None  # the dtype of what is not quantized, fp16 or bf16; None: that of the model, or float32
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


def kernels_of(asked: str | None, format_: str) -> str | None:
    """How kernels are chosen, as far as that was asked for; None for a format that says nothing of them.

    Raises:
        UsageError: there is no such way, or there is nothing to choose.
    """
    if asked is not None and asked not in KERNELS:
        raise UsageError(f"there are no {asked!r} kernels", hint=f"--kernels {' or '.join(KERNELS)}")
    if format_ == ONNX.name:
        return asked or MEASURED
    if asked is not None:
        raise UsageError(
            f"an artifact of format {format_} names no kernels: its engine chooses them",
            hint="leave --kernels out",
        )
    return None


def require_castable(request: QuantizeRequest) -> None:
    """See that the format has a dtype to choose for what is not quantized.

    Raises:
        UsageError: it has not, or there is no such dtype.
    """
    if request.cast is None:
        return
    check_dtype(request.cast)
    if request.format != HF.name:
        raise UsageError(
            f"format {request.format} has one dtype for what is not quantized", hint=f"--format {HF.name}, or no --cast"
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


def require_timely(request: QuantizeRequest) -> None:
    """See that its method can be done in more time or less, where a request gives some.

    Raises:
        UsageError: it cannot.
    """
    check_minutes(request.minutes, request.method)


def require_trainable(request: QuantizeRequest) -> None:
    """See that what is said of training is said of a method that trains, and can be done.

    Raises:
        UsageError: it is not, or cannot.
    """
    if request.training is None:
        return
    if not trains(request.method):
        raise UsageError(
            f"method {request.method} does not train: it reads no --train-data, and has no steps",
            hint=f"--method {request.method}+{TRAINED}",
        )
    request.training.check()
    if request.training.shard and place()[1] == 1:
        raise UsageError(
            "one process has nobody to divide what training takes with",
            hint="torchrun --nproc-per-node 2 -m llmopt quantize …, or leave --shard out",
        )


def training_corpus(request: QuantizeRequest, progress: Progress) -> Corpus | None:
    """What a method that trains learns from; None for one that does not.

    Raises:
        UsageError: it is not there.
        DataError: a dataset cannot be fetched, or holds no text.
    """
    if not trains(request.method):
        return None
    data = None if request.training is None else request.training.data
    if data is None:
        return (
            built_in("calibration", TRAINING_STORIES)
            if request.calib is None
            else load_text(request.calib, TO_FIT, progress)
        )
    return load_text(data, TO_FIT, progress)


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
