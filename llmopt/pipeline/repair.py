"""Where int8 activations flip tokens, the products that lose most by them get a kernel that does not round.

Rounding costs most products 1 % of what tells tokens apart, some 5 %, and flips some tokens whose two likeliest
successors were as good as equal: no single product is to blame, and all of them in float32 would decode several times
slower. A product whose input has channels far larger than their neighbours loses many times as much; that one is
replaced.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from llmopt.engine.ort import OrtEngine
from llmopt.engine.segments import run_in_segments
from llmopt.export.onnx.graph import GRAPH_FILE
from llmopt.export.onnx.levels import in_float32
from llmopt.export.onnx.together import together
from llmopt.export.onnx.unrounded import ERRORS, rounding_products, unround, with_errors
from llmopt.model.spec import ModelSpec
from llmopt.pipeline.verify import Activations, Reference, Verification, compare, whole_sequence
from llmopt.report.results import LayerResult
from llmopt.words import counted

MOST_FLIPPED = 0.02  # of the tokens, before it is asked which products do it
STANDS_OUT = 0.1  # ten times the usual error


def repaired(verification: Verification, folder: Path, reference: Reference, threads: int) -> Verification:
    """See whether int8 activations flip tokens, and which products do it; rewrite the graph in `folder` without those.

    It stays as it was where that flips no fewer tokens.
    """
    shipped = verification.shipped
    assert shipped is not None
    # Under a scheme that rounds activations itself, what that flips is not the kernels' doing.
    expected = (verification.rounded or verification.exact).top1_agreement
    model = onnx.load(folder / GRAPH_FILE, load_external_data=False)
    if expected - shipped.top1_agreement <= MOST_FLIPPED or not rounding_products(model):
        return verification
    errors = rounding_errors(folder, reference, threads)
    outliers = {name: error for name, error in errors.items() if error > STANDS_OUT}
    found = Activations(flipped=expected - shipped.top1_agreement, largest_error=max(errors.values()), unrounded={})
    if outliers:
        before = (folder / GRAPH_FILE).read_bytes()
        (folder / GRAPH_FILE).write_bytes(unround(model, outliers).SerializeToString(deterministic=True))
        better = compare(OrtEngine(folder, threads), reference)
        if better.top1_agreement > shipped.top1_agreement:
            return replace(verification, shipped=better, activations=replace(found, unrounded=outliers))
        (folder / GRAPH_FILE).write_bytes(before)
    return replace(verification, activations=found)


def rounding_errors(folder: Path, reference: Reference, threads: int) -> dict[str, float]:
    """What rounding changes in the results of each product, relative to what tells tokens apart: the median token's."""
    model = onnx.load(folder / GRAPH_FILE, load_external_data=False)
    names = rounding_products(model)
    feeds = [whole_sequence(reference.spec, ids) for ids in reference.windows if len(ids) > 1]
    if not feeds:
        return dict.fromkeys(names, 0.0)
    found = run_in_segments(with_errors(in_float32(model), names), folder, feeds, ERRORS, threads)
    medians = np.median(np.concatenate(found, axis=1), axis=1)
    return {name: float(error) for name, error in zip(names, medians, strict=True)}


def with_reasons(
    layers: tuple[LayerResult, ...], spec: ModelSpec, unrounded: Mapping[str, float]
) -> tuple[LayerResult, ...]:
    """The layers, those that got another kernel saying so."""
    errors = {name: error for node, error in unrounded.items() for name in layers_of(node, spec)}
    return tuple(
        replace(layer, reason="; ".join(filter(None, [layer.reason, _reason(errors[layer.name])])))
        if layer.name in errors
        else layer
        for layer in layers
    )


def notes_on(activations: Activations | None) -> tuple[str, ...]:
    """What a report says of flipped tokens, in a sentence."""
    if activations is None:
        return ()
    flipped = f"int8 activations inside the kernels flipped {activations.flipped:.1%} of the most likely tokens"
    if not activations.unrounded and activations.largest_error > STANDS_OUT:
        worst = f"the worst product loses {activations.largest_error:.0%} of what tells tokens apart"
        return (f"{flipped}; {worst}, but kernels in float32 for those that stand out flipped no fewer",)
    if not activations.unrounded:
        worst = f"no product stands out: the worst loses {activations.largest_error:.1%} of what tells tokens apart"
        return (f"{flipped}; {worst}",)
    names = ", ".join(activations.unrounded)
    return (f"{flipped}; {counted(len(activations.unrounded), 'product')} got another kernel for it: {names}",)


def layers_of(node: str, spec: ModelSpec) -> list[str]:
    """The linears that a product of the graph computes: itself, or all that read one input at once."""
    for block in spec.blocks:
        if node in together(block):
            return [linear.name for linear in together(block)[node]]
    return [node]


def _reason(error: float) -> str:
    return f"multiplies float32 activations: rounded to int8, {error:.0%} of its result was lost and tokens flipped"
