"""The residual stream is turned where outputs err less for it, left where they do not, and never where it cannot be."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmopt.engine.blocks import plain
from llmopt.engine.ort import OrtEngine
from llmopt.engine.torch import TorchEngine
from llmopt.model.checkpoint import Tensors, open_checkpoint
from llmopt.model.source import open_source
from llmopt.model.spec import ModelSpec
from llmopt.model.turned import TurnedTensors
from llmopt.pipeline import turning
from llmopt.pipeline.basis import why_not
from llmopt.pipeline.calibration import Calibration
from llmopt.pipeline.export import Export, export
from llmopt.pipeline.formats.registry import FORMATS
from llmopt.pipeline.moments import Bounded
from llmopt.pipeline.parts import PartReader
from llmopt.pipeline.prepare import prepare
from llmopt.pipeline.quantize import QuantizeResult, quantize
from llmopt.pipeline.ranks import ALONE, Ranks
from llmopt.pipeline.request import QuantizeRequest
from llmopt.pipeline.turning import best_basis
from llmopt.precision.budget import parse_budget
from llmopt.progress import Silent
from llmopt.quantize.assign import assign
from llmopt.quantize.execute import round_rows
from llmopt.quantize.fold import COARSE
from llmopt.quantize.rotate import Rotate
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from tests.decoders import assignments
from tests.families import CASES, Saved, random_weights, spec_of
from tests.ranks import together
from tests.whole_way import bytes_of

WINDOWS = [np.random.default_rng(seed).integers(0, 97, 32) for seed in range(4)]
IDS_BT = np.random.default_rng(5).integers(3, 99, (1, 60))
LOUD = 11  # a channel
READERS = tuple(f"{side}_proj.weight" for side in ("q", "k", "v", "gate", "up"))

Change = Callable[[dict[str, Tensor]], None]


def loud_channel(tensors: dict[str, Tensor]) -> None:
    """One channel of the stream is a hundred times as large as it was, and what reads it takes it for no more."""
    tensors["model.embed_tokens.weight"][:, LOUD] *= 100
    tensors["model.norm.weight"][LOUD] /= 100
    for name, weight in tensors.items():
        if name.endswith(READERS):
            weight[:, LOUD] /= 100


def on_the_grid(tensors: dict[str, Tensor]) -> None:
    """Eight bits hold every weight as it is."""
    for name, weight in tensors.items():
        if "_proj" in name and name.endswith("weight"):
            tensors[name] = Rtn().quantize(weight.float(), parse_scheme("w8a16")).dequantize()


def model_with(change: Change, original: Path, folder: Path) -> Path:
    shutil.copytree(original, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def loud(tiny_llama: Path, tmp_path: Path) -> Path:
    return model_with(loud_channel, tiny_llama, tmp_path / "loud")


@pytest.fixture
def loud_tied(tiny_qwen2: Path, tmp_path: Path) -> Path:
    return model_with(loud_channel, tiny_qwen2, tmp_path / "loud_tied")


def request_for(
    model: Path, output: Path, scheme: str = "w8a8", method: str = "rotate", **more: object
) -> QuantizeRequest:
    asked = {"model": str(model), "output": output, "scheme": parse_scheme(scheme), "method": method}
    return QuantizeRequest(**asked, calib_tokens=1024, **more)  # type: ignore[arg-type]


def written(
    model: Path, output: Path, scheme: str = "w8a8", method: str = "rotate", *, ranks: Ranks = ALONE, **more: object
) -> QuantizeResult:
    return quantize(request_for(model, output, scheme, method, **more), ranks=ranks)


def float_logits(model: Path) -> np.ndarray:
    source = open_source(str(model))
    with open_checkpoint(source) as checkpoint:
        return TorchEngine(source.spec, checkpoint).logits(IDS_BT)


def error_of(folder: Path, expected: np.ndarray) -> float:
    return float(np.linalg.norm(OrtEngine(folder, 1).logits(IDS_BT) - expected) / np.linalg.norm(expected))


def inputs_of(spec: ModelSpec, tensors) -> dict[str, Tensor]:
    """What enters each linear of a float model, of all windows."""
    seen: dict[str, list[Tensor]] = {}

    def noting(weights):
        def apply(linear, x):
            seen.setdefault(linear.name, []).append(x.flatten(0, -2))
            return plain(weights)(linear, x)

        return apply

    engine = TorchEngine(spec, tensors, linears=noting)
    for ids in WINDOWS:
        engine.logits(ids[None])
    return {name: torch.cat(found) for name, found in seen.items()}


def bounds_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """By what each token is multiplied, [tokens, 1]."""
    found = {}
    for name, x in inputs.items():
        bounded = Bounded(ALONE)
        windows = [bounded(part) for part in x.split(len(WINDOWS[0]))]
        found[name] = (torch.cat(windows).norm(dim=-1) / x.norm(dim=-1))[:, None]
    return found


def slowly(spec: ModelSpec, saved: Saved, turn_HH: Tensor | None, given, bounds) -> float:
    """The mean error over linears in a basis, from the model as it runs in it."""
    tensors = saved if turn_HH is None else TurnedTensors(saved, spec, turn_HH)
    inputs = inputs_of(spec if turn_HH is None else tensors.spec, tensors)
    errors = []
    for linear in spec.linears():
        scheme = given[linear.name].scheme
        if scheme == parse_scheme("w8a16"):  # of a head, which does not count
            continue
        x, weight = inputs[linear.name] * bounds[linear.name], tensors.read(linear.weight)
        rounded = COARSE.round_to_grid(weight, scheme, x.square().mean(0)).dequantize()
        seen = round_rows(x) if scheme.activation_bits == 8 else x
        errors.append(float((seen @ rounded.T - x @ weight.T).square().sum() / (x @ weight.T).square().sum()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize(("scheme", "table"), [("w8a8", "w8a16"), ("w4a16-sym", "w4a16-sym")])
@pytest.mark.parametrize("case", ["llama", "qwen3", "phi3, plain"])
def test_errors_are_those_of_the_model_as_it_runs_in_each_basis(case, scheme, table):
    spec = spec_of(CASES[case])
    saved = random_weights(spec)
    given = assign(spec, parse_scheme(scheme), [("lm_head", parse_scheme(table))])
    basis = best_basis(spec, saved, given, WINDOWS, Rotate(stream_tries=2), progress=Silent())
    unit = TurnedTensors(saved, spec, None)
    bounds = bounds_of(inputs_of(unit.spec, unit))
    turns = [None, *(Rotate().of_stream(spec.hidden_size, seed) for seed in range(2))]
    as_stored, *others = (slowly(spec, saved, turn, given, bounds) for turn in turns)
    assert basis.error_as_stored == pytest.approx(as_stored, rel=1e-2)
    assert basis.error_turned == pytest.approx(min(others), rel=1e-2)
    assert basis.seed == (None if as_stored <= min(others) else others.index(min(others)))


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_what_enters_the_head_is_what_did_turned(case):
    """Of a tied one; another, whose gain it has taken, sees it before the gain."""
    spec = spec_of(CASES[case])
    saved, turn_HH = random_weights(spec), Rotate().of_stream(spec.hidden_size, 1)
    turned = TurnedTensors(saved, spec, turn_HH)
    before = saved if spec.tied else TurnedTensors(saved, spec, None)
    expected_HH = turn_HH.T @ moment_before_head(spec, before) @ turn_HH
    found_HH = moment_before_head(turned.spec, turned)
    torch.testing.assert_close(found_HH, expected_HH, rtol=1e-4, atol=1e-4)


def moment_before_head(spec: ModelSpec, tensors: Tensors) -> Tensor:
    calibration = Calibration(spec, WINDOWS)
    return calibration.head_in_float(
        lambda wanted: {tensor.name: tensors.read(tensor) for tensor in wanted}
    ).second_moment_II


@pytest.mark.parametrize("model", ["loud", "loud_tied"])
def test_a_channel_that_is_far_larger_than_the_others_is_spread_and_less_is_lost(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    expected = float_logits(folder)
    turned, stored = written(folder, tmp_path / "turned"), written(folder, tmp_path / "stored", method="search")
    assert 1.5 * error_of(turned.path, expected) < error_of(stored.path, expected)
    assert turned.verification.exact.relative_error < 2e-5
    found = turned.report.settings["basis"]
    assert found["seed"] is not None
    assert found["error_turned"] < found["error_as_stored"]
    (note,) = (note for note in turned.report.notes if note.startswith("rotate"))
    assert f"{found['error_turned']:.3g}" in note
    assert f"{found['error_as_stored']:.3g}" in note


def test_every_layer_of_a_turned_model_says_so(loud_tied: Path, tmp_path: Path) -> None:
    result = written(loud_tied, tmp_path / "out", "w8a8", "rotate+gptq")
    layers = {layer.name: layer for layer in result.report.candidates[0].layers}
    before_head = layers.pop("lm_head.turn")
    assert before_head.scheme is None
    assert "tied" in (before_head.reason or "")
    assert {layer.method for layer in layers.values()} == {"rotate+gptq", "rotate+rtn"}
    assert layers["lm_head"].method == layers["model.embed_tokens"].method == "rotate+rtn"
    card = (result.path / "README.md").read_text()
    assert "lm_head.turn" in card
    assert "Its residual stream is in a rotated basis." in card


def test_all_of_several_processes_turn_alike(loud: Path, tmp_path: Path) -> None:
    alone = written(loud, tmp_path / "alone", "w8a8", "rotate+gptq")
    first, second = together(2, lambda ranks: written(loud, tmp_path / "out", "w8a8", "rotate+gptq", ranks=ranks))
    assert first.report.settings["basis"] == second.report.settings["basis"] == alone.report.settings["basis"]
    assert first.verification.exact.relative_error < 2e-5
    expected = float_logits(loud)
    assert error_of(first.path, expected) == pytest.approx(error_of(alone.path, expected), rel=0.2)


def test_nothing_but_the_weights_is_other_than_without(loud_tied: Path, tmp_path: Path) -> None:
    turned, stored = written(loud_tied, tmp_path / "a"), written(loud_tied, tmp_path / "b", method="search")
    same = {"genai_config.json", "config.json", "tokenizer.json"}
    assert all((turned.path / name).read_bytes() == (stored.path / name).read_bytes() for name in same)


def test_weights_that_are_on_the_grid_stay_on_it(tiny_llama: Path, tmp_path: Path) -> None:
    model = model_with(on_the_grid, tiny_llama, tmp_path / "model")
    result = written(model, tmp_path / "out", "w8a16")
    found = result.report.settings["basis"]
    assert found["seed"] is None
    assert found["error_as_stored"] < 1e-9 < found["error_turned"]
    assert any(note.startswith("rotate leaves the residual stream as it is: squared") for note in result.report.notes)
    stored = written(model, tmp_path / "stored", "w8a16", "search")
    table = "model.embed_tokens"
    for one in (result, stored):
        layers = {layer.name: layer for layer in one.report.candidates[0].layers}
        assert layers[table].method == "rtn"


@pytest.mark.parametrize(("model", "turn"), [("tiny_llama", 0), ("tiny_qwen2", 1)])
def test_a_graph_of_a_turned_float_model_is_the_model(
    model: str, turn: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    source = open_source(str(folder))
    given = assignments(source.spec, lambda name: None)
    job = Export(source=source, assignments=given, method=None, seed=0, threads=1, turn=turn)
    _, verification = export(job, tmp_path, Silent())
    assert verification.exact.relative_error < 5e-6
    assert error_of(tmp_path, float_logits(folder)) < 1e-5


def test_a_table_of_four_bits_is_fitted_to_what_enters_the_head_in_the_new_basis(
    loud_tied: Path, tmp_path: Path
) -> None:
    overrides = (("lm_head", parse_scheme("w4a16-sym")),)
    result = written(loud_tied, tmp_path / "out", "w8a8", "rotate+gptq", overrides=overrides)
    assert result.report.settings["basis"]["seed"] is not None
    table = next(layer for layer in result.report.candidates[0].layers if layer.name == "model.embed_tokens")
    assert table.method == "rotate+gptq"
    assert result.verification.exact.relative_error < 2e-5


def test_a_head_of_its_own_is_turned_in_a_checkpoint_for_transformers(loud: Path, tmp_path: Path) -> None:
    result = written(loud, tmp_path / "out", "w8a8", "rotate+gptq", format="hf")
    assert result.report.settings["basis"]["seed"] is not None
    assert result.verification.exact.relative_error < 1e-5
    stored = load_file(loud / "model.safetensors")["lm_head.weight"]
    assert not torch.allclose(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].float(), stored)


@pytest.mark.parametrize(
    ("case", "format_", "reason"),
    [
        ("gpt2", "onnx", "the norms of gpt2 take the mean"),
        ("opt", "hf", "the norms of opt take the mean"),
        ("gemma3", "onnx", "before it is added"),
        ("qwen3", "hf", "format hf has no place"),
        ("qwen3", "gptq", "format gptq has no place"),
        ("qwen3", "onnx", None),
        ("qwen2", "hf", None),
        ("qwen2", "gptq", None),
    ],
)
def test_what_cannot_be_turned(case, format_, reason):
    spec, found = spec_of(CASES[case]), FORMATS[format_]
    why = why_not(spec, found, assign(spec, parse_scheme("w4a16-sym"), tables=found.tables))
    assert why is None if reason is None else (why is not None and reason in why)


@pytest.mark.parametrize("ignored", ["down_proj", "layers.0.*", "lm_head", "embed_tokens"])
def test_what_is_to_stay_as_it_is_does(ignored: str, tiny_llama: Path, tmp_path: Path) -> None:
    spec = open_source(str(tiny_llama)).spec
    for format_ in ("onnx", "hf"):
        found = FORMATS[format_]
        assert "to stay as it is" in (
            why_not(spec, found, assign(spec, parse_scheme("w8a8"), (), [ignored], found.tables)) or ""
        )
    result = written(tiny_llama, tmp_path / "out", ignore=(ignored,))
    assert "basis" not in result.report.settings
    assert any(note.endswith("is to stay as it is") for note in result.report.notes)


class StoppedError(Exception):
    """In the middle."""


@pytest.mark.parametrize("model", ["loud", "loud_tied"])
def test_a_run_that_goes_on_does_so_in_the_basis_that_was_chosen(
    model: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(model)
    expected = bytes_of(written(folder, tmp_path / "whole", "w8a8", "rotate+gptq").path)

    def stop(*arguments: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(PartReader, "head", stop)
        with pytest.raises(StoppedError):
            written(folder, tmp_path / "stopped", "w8a8", "rotate+gptq")
    with monkeypatch.context() as patched:
        patched.setattr(turning, "best_basis", stop)
        patched.setattr(PartReader, "_made_block", stop)
        found = bytes_of(written(folder, tmp_path / "stopped", "w8a8", "rotate+gptq").path)
    reports = [json.loads(files.pop("report.json")) for files in (expected, found)]
    assert expected == found
    assert reports[0]["settings"] == reports[1]["settings"]


def test_what_it_takes_is_known_with_the_product_before_a_tied_head(loud_tied: Path, tmp_path: Path) -> None:
    asked = request_for(loud_tied, tmp_path / "out")
    estimate = prepare(asked, Silent()).estimated_bytes
    assert quantize(asked).report.settings["basis"]["seed"] is not None
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size == pytest.approx(estimate, rel=0.01)
    budgeted = request_for(loud_tied, tmp_path / "out", "w4a16", budget=parse_budget("5bits"))
    mixes = [prepare(request, Silent()).mix for request in (budgeted, replace(budgeted, method="search"))]
    turned, stored = (0 if mix is None else mix.overhead_bytes for mix in mixes)
    assert turned - stored == 4 * 64**2
