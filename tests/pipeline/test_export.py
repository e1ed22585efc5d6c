"""A model folder as an artifact's files: streamed, verified, and opened by programs that no one here wrote."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.engine.ort import OrtEngine
from llmopt.engine.torch import TorchEngine
from llmopt.errors import ModelError, UnsupportedError
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.source import open_source
from llmopt.pipeline.export import Export, export, rounds_activations
from llmopt.pipeline.formats.onnx import estimated_bytes
from llmopt.progress import Silent
from llmopt.quantize.grid import HALF_SCALE
from llmopt.quantize.rtn import Rtn
from tests.decoders import assignments

IDS = np.random.default_rng(0).integers(3, 99, 40)
SCHEMES = [None, "w2a16", "w8a16", "w4a16", "w4a16-sym", "w8a8"]


def job_for(model: Path, scheme: str | None) -> Export:
    source = open_source(str(model))
    return Export(
        source=source,
        assignments=assignments(source.spec, lambda name: scheme),
        method=None if scheme is None else Rtn(scales=HALF_SCALE),
        seed=0,
        threads=1,
    )


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


def changed_model(original: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(original, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_unquantized_export_is_the_model(tiny_llama: Path, output: Path) -> None:
    job = job_for(tiny_llama, None)
    layers, verification = export(job, output, Silent())
    with open_checkpoint(job.source) as checkpoint:
        expected = TorchEngine(job.spec, checkpoint).logits(IDS[None])
    np.testing.assert_allclose(OrtEngine(output, 1).logits(IDS[None]), expected, atol=1e-4 * np.abs(expected).max())
    assert verification.exact.relative_error < 5e-6
    assert {layer.scheme for layer in layers} == {None}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_folder_holds_what_engines_need_and_nothing_else(
    tiny_llama: Path, output: Path, scheme: str | None
) -> None:
    _, verification = export(job_for(tiny_llama, scheme), output, Silent())
    assert {path.name for path in output.iterdir()} == {
        "model.onnx",
        "model.onnx.data",
        "config.json",
        "generation_config.json",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((output / "config.json").read_text())["model_type"] == "llama"
    assert verification.exact.relative_error < 2e-5
    assert (verification.rounded is not None) == (scheme == "w8a8")


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_every_layer_is_reported_with_its_scheme(tiny_llama: Path, output: Path, scheme: str) -> None:
    job = job_for(tiny_llama, scheme)
    layers, _ = export(job, output, Silent())
    assert [layer.name for layer in layers] == list(job.assignments)
    for layer in layers:
        assigned = job.assignments[layer.name].scheme
        assert assigned is not None
        assert (layer.scheme, layer.method) == (assigned.name, "rtn")
        assert layer.relative_error is not None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_estimate_is_what_the_weights_take(tiny_llama: Path, output: Path, scheme: str | None) -> None:
    """All but padding to cache lines."""
    job = job_for(tiny_llama, scheme)
    export(job, output, Silent())
    size = (output / "model.onnx.data").stat().st_size
    assert size == pytest.approx(estimated_bytes(job.spec, job.assignments), rel=0.01)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_two_exports_write_the_same_bytes(tiny_llama: Path, tmp_path: Path, scheme: str) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        export(job_for(tiny_llama, scheme), tmp_path / name, Silent())
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first == second


def test_onnxruntime_genai_generates_what_a_stream_generates(tiny_llama: Path, output: Path) -> None:
    export(job_for(tiny_llama, "w4a16"), output, Silent())
    model = onnxruntime_genai.Model(str(output))
    prompt = onnxruntime_genai.Tokenizer(model).encode("Hello")
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=40, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()

    spec, stream = open_source(str(tiny_llama)).spec, OrtEngine(output, 1).stream(capacity=40)
    tokens = new = [int(token) for token in prompt]
    while len(tokens) < 40 and (new := [int(stream.feed(np.array(new)).argmax())])[0] not in spec.eos_token_ids:
        tokens = tokens + new
    assert [int(token) for token in generator.get_sequence(0)] == tokens
    assert len(tokens) > len(prompt) + 10


def test_a_damaged_weight_is_named_and_the_data_file_closed(tiny_llama: Path, tmp_path: Path, output: Path) -> None:
    """An open file would be a warning, and warnings are errors."""
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 4] = torch.nan

    model = changed_model(tiny_llama, tmp_path / "model", spoil)
    with pytest.raises(ModelError, match=name):
        export(job_for(model, "w4a16"), output, Silent())


def test_heads_without_a_kernel_are_refused(tiny_llama: Path, tmp_path: Path, output: Path) -> None:
    job = job_for(tiny_llama, "w4a16")
    blocks = tuple(replace(block, attention=replace(block.attention, head_dim=12)) for block in job.spec.blocks)
    source = replace(job.source, spec=replace(job.spec, blocks=blocks))
    with pytest.raises(UnsupportedError, match="heads of 12 channels"):
        export(replace(job, source=source), output, Silent())
    assert not (output / "model.onnx.data").exists()


def test_progress_counts_every_part(tiny_llama: Path, output: Path) -> None:
    steps: dict[str, list[float]] = {}

    class Counting(Silent):
        def task(self, description: str, total: float | None = None) -> Any:
            steps[description] = [total or 0, 0]
            self.current = description
            return super().task(description, total)

        def advance(self, steps_done: float = 1, note: str | None = None) -> None:
            steps[self.current][1] += steps_done

    export(job_for(tiny_llama, "w8a8"), output, Counting())
    assert len(steps) == 2
    for total, done in steps.values():
        assert total == done > 2


def test_whether_activations_are_rounded_is_read_off_the_schemes(tiny_llama: Path) -> None:
    spec = open_source(str(tiny_llama)).spec

    def rounds(scheme_of: Callable[[str], str | None]) -> bool:
        return rounds_activations(assignments(spec, scheme_of))

    assert not rounds(lambda name: None)
    assert not rounds(lambda name: "w8a16")
    assert rounds(lambda name: "w8a8" if name == "model.layers.1.mlp.down_proj" else "w4a16")
