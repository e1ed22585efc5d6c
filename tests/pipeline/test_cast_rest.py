"""Quantized models whose floats are cast: in the dtype that was asked for, but for what that cannot hold."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmopt.artifact import load_manifest
from llmopt.pipeline.quantize import QuantizeResult, quantize
from llmopt.pipeline.request import QuantizeRequest
from llmopt.quantize.scheme import parse_scheme
from tests.overflow import plant_overflow
from tests.whole_way import CommandLine

IDS = torch.tensor([[5, 9, 33, 70, 12, 40, 8, 61]])


def written(model: Path, output: Path, cast: str | None, scheme: str = "w4a16-sym", **more: object) -> QuantizeResult:
    request = QuantizeRequest(
        model=str(model), output=output, scheme=parse_scheme(scheme), format="hf", cast=cast, **more
    )
    return quantize(request)


def dtypes(folder: Path) -> set[torch.dtype]:
    tensors = load_file(folder / "model.safetensors").values()
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


@pytest.mark.parametrize(
    ("cast", "word"), [("fp16", "float16"), ("bf16", "bfloat16"), (None, "float32")], ids=["fp16", "bf16", "as it was"]
)
@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_floats_and_scales_follow_the_cast(
    tiny_llama: Path, cast: str | None, word: str, scheme: str, tmp_path: Path
) -> None:
    result = written(tiny_llama, tmp_path / "out", cast, scheme)
    assert dtypes(tmp_path / "out") == {getattr(torch, word)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == word
    assert result.verification.exact.relative_error < 1e-5
    head = next(layer for layer in result.report.candidates[0].layers if layer.name == "lm_head")
    assert str(head.reason).endswith("floats" if cast is None else f"; {cast}")
    assert (f"what is not quantized is {cast}" in result.report.notes) == (cast is not None)


def test_a_fitted_model_is_cast_too_and_its_folds_with_it(tiny_llama: Path, tmp_path: Path) -> None:
    written(tiny_llama, tmp_path / "out", "bf16", method="awq+gptq", calib_tokens=512)
    assert dtypes(tmp_path / "out") == {torch.bfloat16}


def test_where_fp16_would_overflow_the_config_says_float32(tmp_path: Path) -> None:
    model = plant_overflow(tmp_path / "model")
    result = written(model, tmp_path / "out", "fp16", "w8a16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert dtypes(tmp_path / "out") == {torch.float16}
    assert any("would not do for model.layers.0.mlp.down_proj" in note for note in result.report.notes)
    assert bool(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits.isfinite().all())


def test_a_table_that_fp16_cannot_hold_stays_float32(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][100, 3] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = written(folder, tmp_path / "out", "fp16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    wide = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert wide == {"model.embed_tokens.weight"}
    assert stored["model.embed_tokens.weight"][100, 3] == 1e5
    table = result.report.candidates[0].layers[0]
    assert "; fp32: overflow: its weights reach 1e+05" in str(table.reason)


def test_the_manifest_and_the_card_say_so(tiny_llama: Path, tmp_path: Path) -> None:
    keys = {written(tiny_llama, tmp_path / str(cast), cast).manifest.key for cast in (None, "fp16", "bf16")}
    assert len(keys) == 3
    assert load_manifest(tmp_path / "fp16").cast == "fp16"
    assert "--cast fp16" in (tmp_path / "fp16" / "README.md").read_text(encoding="utf-8")
    assert "--cast" not in (tmp_path / "None" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--cast", "fp16"], "format onnx has one dtype for what is not quantized"),
        (["--cast", "fp16", "--format", "gptq", "--scheme", "w4a16-sym"], "format gptq has one dtype"),
        (["--cast", "fp32", "--format", "hf"], "no dtype 'fp32'"),
    ],
)
def test_what_cannot_follow_is_refused(
    tiny_llama: Path, words: list[str], what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = CommandLine(capfd)("quantize", tiny_llama, "-o", tmp_path / "out", *words)
    assert ended.code == 2
    assert what in ended.err
