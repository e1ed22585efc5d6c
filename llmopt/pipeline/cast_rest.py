"""What a quantized model keeps as floats, cast to 16 bits: `--cast` of `llmopt quantize`."""

import dataclasses

import torch

from llmopt.artifact import Journal
from llmopt.calibrate.text import built_in
from llmopt.pipeline.calibration_text import CalibrationText
from llmopt.pipeline.cast_request import SCANNED_TOKENS
from llmopt.pipeline.formats.hf import Hf
from llmopt.pipeline.prepare import Prepared
from llmopt.pipeline.scan import RANGES, ranges_from_bytes, ranges_to_bytes, scan
from llmopt.pipeline.soundness import open_tokenizer
from llmopt.precision.cast import DTYPES, CastPlan, choose
from llmopt.precision.short import FP32
from llmopt.progress import Progress
from llmopt.report.results import LayerResult

NAMED = 3  # modules that a note names


def rest_plan(prepared: Prepared, kept: Journal | None, progress: Progress) -> CastPlan | None:
    """What 16 bits do to the float model, where a cast was asked for: text goes through it once.

    Raises:
        LlmoptError: the weights are damaged, or the model overflows float32.
    """
    request, source = prepared.request, prepared.source
    if request.cast is None:
        return None
    data = None if kept is None else kept.read(RANGES)
    if data is None:
        corpus = built_in("calibration") if prepared.calibration is None else prepared.calibration.corpus
        text = CalibrationText(corpus=corpus, tokens=SCANNED_TOKENS)
        windows = text.windows(source.spec, open_tokenizer(source))
        torch.set_num_threads(request.threads)
        folder = request.output.absolute().parent
        data = ranges_to_bytes(scan(source, windows, DTYPES[request.cast], folder, progress))
        if kept is not None:
            kept.write(RANGES, data)
    return choose(source.spec, ranges_from_bytes(data), request.cast)


def with_rest(prepared: Prepared, plan: CastPlan | None) -> Prepared:
    """The same with a format that knows what stays float32."""
    if plan is None:
        return prepared
    assert isinstance(prepared.format, Hf)
    return dataclasses.replace(prepared, format=dataclasses.replace(prepared.format, plan=plan))


def rest_layers(layers: tuple[LayerResult, ...], plan: CastPlan | None) -> tuple[LayerResult, ...]:
    """Layers, those that are not quantized with the dtype that they have."""
    if plan is None:
        return layers
    return tuple(layer if layer.scheme is not None else _with_dtype(layer, plan) for layer in layers)


def rest_notes(plan: CastPlan | None) -> tuple[str, ...]:
    """What a person should know of the dtypes."""
    if plan is None:
        return ()
    stored = f"what is not quantized is {plan.dtype_name}"
    if not plan.kept:
        return (stored,)
    names = ", ".join(choice.name for choice in plan.kept[:NAMED]) + ", …" * (len(plan.kept) > NAMED)
    computed = (
        f"the config says float32, in which transformers then computes: {plan.dtype_name} would not do for {names}"
    )
    return (f"{stored} where it can be, and {computed}",)


def _with_dtype(layer: LayerResult, plan: CastPlan) -> LayerResult:
    choice = plan.choices[layer.name]
    dtype = plan.dtype_name if choice.half else f"{FP32}: {choice.reason}"
    return dataclasses.replace(layer, reason=f"{layer.reason}; {dtype}" if layer.reason else dtype)
