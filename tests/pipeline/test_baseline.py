"""The float32 baseline: exported once, kept, and written again when anything about it is wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.engine.ort import OrtEngine
from llmopt.pipeline.baseline import float_artifact
from llmopt.pipeline.cache import CACHE_VARIABLE, cache_folder
from llmopt.progress import Silent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def baseline(model: Path) -> Path:
    return float_artifact(str(model), revision=None, threads=1, progress=Silent())


def test_a_baseline_is_exported_once(tiny_llama: Path, cache: Path) -> None:
    first = baseline(tiny_llama)
    written = (first / "model.onnx").stat().st_ino
    assert cache in first.parents
    assert baseline(tiny_llama) == first
    assert (first / "model.onnx").stat().st_ino == written


@pytest.mark.parametrize("name", ["model.onnx.data", "config.json"])
def test_one_that_lost_a_part_is_written_again(tiny_llama: Path, name: str) -> None:
    folder = baseline(tiny_llama)
    before = OrtEngine(folder, threads=1).logits(np.arange(5)[None])
    (folder / name).unlink()
    assert baseline(tiny_llama) == folder
    np.testing.assert_array_equal(OrtEngine(folder, threads=1).logits(np.arange(5)[None]), before)


def test_a_file_cut_short_is_noticed(tiny_llama: Path) -> None:
    folder = baseline(tiny_llama)
    data = folder / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    baseline(tiny_llama)
    assert data.read_bytes() == whole


def test_other_weights_are_another_baseline(tiny_llama: Path, tmp_path: Path) -> None:
    """Two folders may have one name, and a folder may be trained on."""
    other = shutil.copytree(tiny_llama, tmp_path / tiny_llama.name)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += torch.ones(())
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert baseline(other) != baseline(tiny_llama)


def test_an_artifact_is_its_own_baseline(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(baseline(tiny_llama), tmp_path / "artifact")
    assert baseline(artifact) == artifact


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({CACHE_VARIABLE: "/a"}, "/a"),
        ({CACHE_VARIABLE: "", "XDG_CACHE_HOME": "/b"}, "/b/llmopt"),
        ({CACHE_VARIABLE: "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/llmopt"),
    ],
)
def test_the_cache_lies_where_the_environment_says(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)
