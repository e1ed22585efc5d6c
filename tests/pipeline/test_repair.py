"""A product whose int8 activations flip tokens gets another kernel; those of a sound model keep theirs."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from llmopt.engine.ort import OrtEngine
from llmopt.export.onnx.graph import DATA_FILE, GRAPH_FILE
from llmopt.model.spec import ModelSpec
from llmopt.pipeline.repair import STANDS_OUT, layers_of, repaired, rounding_errors, with_reasons
from llmopt.pipeline.verify import Reference, Verification, verify
from llmopt.progress import Silent
from llmopt.report.results import LayerResult
from tests.decoders import write_decoder
from tests.families import CASES, Saved, random_weights, spec_of

WINDOWS = [np.random.default_rng(seed).integers(0, 97, 60) for seed in range(3)]
SICK = 1
PRODUCT = f"model.layers.{SICK}.mlp.gate_up_proj"  # of both, which have one scheme
UP, GATE = (f"model.layers.{SICK}.mlp.{name}_proj" for name in ("up", "gate"))
SCHEMES = ["w4a16", "w8a16", "w8a16-g32-asym", "w4a16-channel"]


def with_outliers(saved: Saved, spec: ModelSpec) -> Saved:
    """Channels of one MLP's input far larger than their neighbours, which its weights make nothing of.

    One in eight, so that each block of the kernel has some.
    """
    tensors = {name: tensor.clone() for name, tensor in saved.tensors.items()}
    tensors[f"{spec.blocks[SICK].mlp_norm.name}.weight"][::8] *= 3000
    for name in (UP, GATE):
        tensors[f"{name}.weight"][:, ::8] = 0
    return Saved(tensors)


def exported(folder: Path, scheme: str, *, sick: bool, case: str = "mistral") -> tuple[Verification, Reference]:
    spec = spec_of(CASES[case])
    saved = random_weights(spec)
    references = write_decoder(
        folder, spec, with_outliers(saved, spec) if sick else saved, lambda name: scheme, WINDOWS
    )
    return verify(folder, references.exact, None, 1, Silent()), references.exact


@pytest.mark.parametrize("scheme", SCHEMES)
def test_flipped_tokens_are_repaired_where_they_are_flipped(scheme: str, tmp_path: Path) -> None:
    before, reference = exported(tmp_path, scheme, sick=True)
    assert before.shipped is not None
    assert before.shipped.top1_agreement < 0.8
    after = repaired(before, tmp_path, reference, threads=1)
    assert after.shipped is not None
    assert after.activations is not None
    assert set(after.activations.unrounded) == {PRODUCT}
    assert after.activations.flipped == pytest.approx(1 - before.shipped.top1_agreement)
    assert after.activations.largest_error == max(after.activations.unrounded.values()) > STANDS_OUT
    assert after.shipped.top1_agreement > 0.95
    assert after.shipped.relative_error < before.shipped.relative_error / 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [GRAPH_FILE, DATA_FILE]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_repaired_graph_still_computes_the_quantized_model(scheme: str, tmp_path: Path) -> None:
    before, reference = exported(tmp_path, scheme, sick=True)
    repaired(before, tmp_path, reference, threads=1)
    assert verify(tmp_path, reference, None, 1, Silent()).exact.relative_error < 2e-5


def test_a_product_with_a_bias_keeps_it(tmp_path: Path) -> None:
    before, reference = exported(tmp_path, "w8a16", sick=True, case="llama")
    after = repaired(before, tmp_path, reference, threads=1)
    assert after.activations is not None
    assert set(after.activations.unrounded) == {PRODUCT}
    assert verify(tmp_path, reference, None, 1, Silent()).exact.relative_error < 2e-5


def test_a_sound_model_stays_as_it_is(tmp_path: Path) -> None:
    before, reference = exported(tmp_path, "w4a16", sick=False)
    graph = (tmp_path / GRAPH_FILE).read_bytes()
    after = repaired(before, tmp_path, reference, threads=1)
    assert after.activations is None or not after.activations.unrounded
    assert after.shipped == before.shipped
    assert (tmp_path / GRAPH_FILE).read_bytes() == graph


def test_what_does_not_help_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, reference = exported(tmp_path, "w4a16", sick=True)
    graph = (tmp_path / GRAPH_FILE).read_bytes()
    wrong = dict.fromkeys(["model.layers.2.mlp.down_proj"], 0.9)
    monkeypatch.setattr("llmopt.pipeline.repair.rounding_errors", lambda *of_graph: wrong)
    monkeypatch.setattr("llmopt.pipeline.repair.compare", lambda engine, reference: before.shipped)
    after = repaired(before, tmp_path, reference, threads=1)
    assert after.activations is not None
    assert (after.activations.unrounded, after.activations.largest_error) == ({}, 0.9)
    assert (tmp_path / GRAPH_FILE).read_bytes() == graph


def test_errors_are_those_of_the_kernel(tmp_path: Path) -> None:
    """Held against the products' own outputs, at both levels, of the whole graph in onnxruntime."""
    _, reference = exported(tmp_path, "w4a16", sick=True)
    errors = rounding_errors(tmp_path, reference, threads=1)
    model = onnx.load(tmp_path / GRAPH_FILE, load_external_data=False)
    assert list(errors) == [node.name for node in model.graph.node if node.op_type == "MatMulNBits"]
    first = next(iter(errors))
    exact, rounded = (outputs_of(tmp_path, first, level) for level in (0, 4))
    with np.errstate(divide="ignore"):  # a token may be followed by itself
        ratios = [
            2**0.5 * np.linalg.norm(y - x, axis=1)[1:] / np.linalg.norm(np.diff(x, axis=0), axis=1)
            for x, y in zip(exact, rounded, strict=True)
        ]
    assert errors[first] == pytest.approx(np.median(np.concatenate(ratios)), rel=1e-3)
    assert errors[PRODUCT] > 10 * errors[first]


def outputs_of(folder: Path, name: str, level: int) -> list[np.ndarray]:
    """What a product of the graph gives for each window, [tokens, rows], at an accuracy level of its own."""
    model = onnx.load(folder / GRAPH_FILE, load_external_data=False)
    (node,) = (node for node in model.graph.node if node.name == name)
    for attribute in node.attribute:
        if attribute.name == "accuracy_level":
            attribute.i = level
    model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], 1, None))
    other = folder / "other.onnx"
    other.write_bytes(model.SerializeToString())
    engine = OrtEngine(other, threads=1)
    other.unlink()
    found = []
    for ids in WINDOWS:
        empty = np.zeros((1, engine.kv_heads, 0, engine.head_dim), np.float32)
        feed = dict.fromkeys(engine.past_names, empty)
        feed |= {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
        found.append(engine.session.run([node.output[0]], feed)[0][0])
    return found


def test_layers_say_what_became_of_them() -> None:
    spec = spec_of(CASES["mistral"])
    attention = "model.layers.0.self_attn"
    assert layers_of(f"{attention}.qkv_proj", spec) == [f"{attention}.{name}_proj" for name in "qkv"]
    assert layers_of(PRODUCT, spec) == [GATE, UP]
    assert layers_of(UP, spec) == [UP]
    layers = tuple(LayerResult(name=name, scheme="w4a16", method="rtn", reason="asked") for name in (UP, GATE))
    told, other = with_reasons(layers, spec, {UP: 0.42})
    assert told.reason == (
        "asked; multiplies float32 activations: rounded to int8, 42% of its result was lost and tokens flipped"
    )
    assert other == layers[1]
