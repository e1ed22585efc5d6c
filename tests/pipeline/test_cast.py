"""From a model to a cast artifact: what overflows is kept, the rest is half the size, and nothing is half done."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime_genai
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmopt.artifact import Resume, journal_folder, load_manifest
from llmopt.engine.ort import OrtEngine
from llmopt.errors import ArtifactError, ExitCode, ModelError, UsageError, VerificationError
from llmopt.model.tokenizer import Tokenizer
from llmopt.pipeline.cast import MIXED_CACHES, cast, plan_cast
from llmopt.pipeline.cast_request import CastRequest, prepare_cast
from llmopt.pipeline.scan import RANGES, scan
from llmopt.progress import Silent
from tests.overflow import plant_overflow
from tests.whole_way import CommandLine, bytes_of

TEXT = torch.tensor([[5, 9, 33, 70, 12, 40, 8, 61]])
STORY = "Mia was a little cat. She lived in a small house by the sea with her friend Tom."


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant_overflow(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture
def llmopt(capfd: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capfd)


def request(model: Path | str, output: Path, dtype: str = "fp16", **more: object) -> CastRequest:
    options = {"calib_tokens": 1024, "threads": 1} | more
    return CastRequest(model=str(model), output=output, dtype=dtype, **options)  # type: ignore[arg-type]


# Planted overflow.


def test_plain_fp16_is_garbage_where_the_stream_overflows(planted: Path) -> None:
    ids = torch.tensor([Tokenizer.from_folder(planted).encode(STORY)])
    logits = AutoModelForCausalLM.from_pretrained(planted, dtype=torch.float16)(ids).logits
    assert bool(logits[:, -1].isnan().all())


@pytest.mark.parametrize("format_", ["onnx", "hf"])
def test_a_cast_keeps_what_overflows_and_agrees(
    planted: Path, format_: str, tmp_path: Path, llmopt: CommandLine
) -> None:
    out = tmp_path / "out"
    words = ["--dtype", "fp16", "--format", format_, "--calib-tokens", "1024", "--threads", "1", "--json"]
    ended = llmopt("cast", planted, "-o", out, *words)
    assert ended.code == 0, ended.err
    layers = {layer["name"]: layer for layer in json.loads(ended.out)["candidates"][0]["layers"]}
    first = layers["model.layers.0.mlp.down_proj"]
    assert (first["scheme"], first["method"]) == ("fp32", None)
    assert first["reason"].startswith("overflow: what it gives reaches 1.2")
    kept = {name for name, layer in layers.items() if layer["scheme"] == "fp32"}
    assert kept <= {f"model.layers.{n}.{name}" for n in range(4) for name in ("mlp.down_proj", "self_attn.o_proj")}
    assert json.loads(ended.out)["settings"]["cast"]["residual_from"] == "model.layers.0.mlp.down_proj"
    words = ["--baseline", planted, "--tokens", "2048", "--no-latency", "--threads", "1", "--json"]
    ended = llmopt("bench", out, *words, "--assert", "perplexity <= +0.1%")
    assert ended.code == 0, ended.err
    (candidate,) = json.loads(ended.out)["candidates"]
    assert candidate["metrics"]["top1_agreement"]["value"] >= 0.995
    assert [layer["name"] for layer in candidate["layers"]] == list(layers)


def test_transformers_alone_computes_right_for_the_config_says_float32(planted: Path, tmp_path: Path) -> None:
    cast(request(planted, tmp_path / "out", format="hf"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.float32
    expected = AutoModelForCausalLM.from_pretrained(planted, dtype=torch.float32)(TEXT).logits
    assert torch.allclose(plain(TEXT).logits, expected, atol=0.05)


def test_what_the_text_did_not_show_fails_before_there_is_an_artifact(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = prepare_cast(request("demo", tmp_path / "other"), Silent())
    seen = scan(demo.source, demo.windows, torch.float16, tmp_path, Silent())
    monkeypatch.setattr("llmopt.pipeline.cast.scan", lambda *arguments: seen)
    with pytest.raises(VerificationError, match="overflow 16 bits") as caught:
        cast(request(planted, tmp_path / "out"))
    assert caught.value.where == "behind block 0"
    assert not (tmp_path / "out").exists()


# What is written.


@pytest.mark.parametrize(("format_", "dtype", "word"), [("hf", "fp16", "float16"), ("hf", "bf16", "bfloat16")])
def test_where_nothing_is_kept_transformers_opens_it_in_16_bits(
    tiny_llama: Path, format_: str, dtype: str, word: str, tmp_path: Path
) -> None:
    result = cast(request(tiny_llama, tmp_path / "out", dtype, format=format_))
    assert result.plan.kept == ()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == word
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, word)
    assert bool(model(TEXT).logits.isfinite().all())


@pytest.mark.parametrize("format_", ["onnx", "hf"])
def test_weights_are_half_the_size(tiny_llama: Path, format_: str, tmp_path: Path) -> None:
    cast(request(tiny_llama, tmp_path / "out", format=format_))
    before = sum(tensor.nbytes for tensor in load_file(tiny_llama / "model.safetensors").values())
    name = {"onnx": "model.onnx.data", "hf": "model.safetensors"}[format_]
    written = (tmp_path / "out" / name).stat().st_size
    assert written == pytest.approx(before / 2, rel=0.06)  # rotary tables, headers and gaps are the rest
    prepared = prepare_cast(request(tiny_llama, tmp_path / "other", format=format_), Silent())
    assert written == pytest.approx(prepared.estimated_bytes, rel=0.06)


def test_every_module_is_accounted_for(tiny_llama: Path, tmp_path: Path) -> None:
    result = cast(request(tiny_llama, tmp_path / "out", keep_fp32=("layers.1.mlp.*", "norm")))
    (candidate,) = result.report.candidates
    tensors = {name.removesuffix(".weight") for name in load_file(tiny_llama / "model.safetensors")}
    assert {layer.name for layer in candidate.layers} == tensors
    kept = {layer.name: layer.reason for layer in candidate.layers if layer.scheme == "fp32"}
    assert kept["model.norm"] == "asked for: matches 'norm'"
    assert {name for name in kept if "mlp" in name} == {
        f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert result.report.settings["cast"]["residual_from"] == "model.layers.1.mlp.down_proj"
    assert "the residual stream is float32 from model.layers.1.mlp.down_proj on" in result.report.notes


def test_the_same_input_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name / "model" for name in "ab"]
    for folder in folders:
        folder.parent.mkdir()
        cast(request(tiny_llama, folder))
    first, second = (
        {name: content for name, content in bytes_of(folder).items() if name != "report.json"} for folder in folders
    )
    assert first == second


def test_the_manifest_tells_casts_apart(tiny_llama: Path, tmp_path: Path) -> None:
    asked = request(tiny_llama, tmp_path / "out")
    others = [
        replace(asked, dtype="bf16", format="hf"),
        replace(asked, format="hf"),
        replace(asked, tolerance=0.02),
        replace(asked, keep_fp32=("norm",)),
        replace(asked, calib_tokens=512),
    ]
    keys = [prepare_cast(one, Silent()).manifest().key for one in (asked, *others)]
    assert len(set(keys)) == len(keys)
    cast(asked)
    assert load_manifest(asked.output, verify=True).key == keys[0]


@pytest.mark.parametrize("format_", ["onnx", "hf"])
def test_the_card_says_what_it_is_and_how_to_make_it_again(tiny_llama: Path, format_: str, tmp_path: Path) -> None:
    cast(request(tiny_llama, tmp_path / "out", format=format_, keep_fp32=("lm_head",), tolerance=0.05))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    command = f"cast {tiny_llama.name} -o OUT --format {format_} --dtype fp16 --tolerance 0.05 --calib-tokens 1024"
    assert f"llmopt {command} --keep-fp32 lm_head" in card
    assert "- fp16\n" in card
    assert "quantized" not in card
    assert ("open_cast" in card) == (format_ == "hf")
    assert "| `lm_head` | fp32 | — | — | asked for: matches 'lm\\_head' |" in card


# What is refused, and what is left behind.


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--dtype", "fp8"], "there is no dtype 'fp8'"),
        (["--dtype", "fp16", "--format", "gptq"], "there is no format 'gptq'"),
        (["--dtype", "fp16", "--tolerance", "0"], "no share of 1"),
        (["--dtype", "fp16", "--keep-fp32", "nothing_here"], "matches no module"),
        (["--dtype", "fp16", "--resume", "--restart"], "exclude each other"),
        ([], "--dtype"),
    ],
)
def test_a_mistake_is_told_with_exit_code_2(
    tiny_llama: Path, words: list[str], what: str, tmp_path: Path, llmopt: CommandLine
) -> None:
    ended = llmopt("cast", tiny_llama, "-o", tmp_path / "out", *words)
    assert ended.code == ExitCode.USAGE
    assert what in ended.err


def test_a_graph_of_bfloat16_is_refused_with_exit_code_3(tiny_llama: Path, tmp_path: Path, llmopt: CommandLine) -> None:
    ended = llmopt("cast", tiny_llama, "-o", tmp_path / "out", "--dtype", "bf16")
    assert ended.code == ExitCode.FAILED
    assert "--dtype fp16, or --format hf" in ended.err


def test_an_artifact_is_no_source_and_nothing_is_overwritten(tiny_llama: Path, tmp_path: Path) -> None:
    asked = request(tiny_llama, tmp_path / "out")
    cast(asked)
    with pytest.raises(UsageError, match="an artifact of llmopt"):
        cast(request(tmp_path / "out", tmp_path / "other"))
    with pytest.raises(ArtifactError):
        cast(asked)
    cast(replace(asked, force=True))


def test_a_dry_run_says_what_each_module_would_get(tiny_llama: Path, tmp_path: Path, llmopt: CommandLine) -> None:
    words = ["--dtype", "fp16", "--keep-fp32", "lm_head", "--calib-tokens", "512", "--dry-run", "--json"]
    ended = llmopt("cast", tiny_llama, "-o", tmp_path / "out", *words)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["schema"] == "llmopt.cast-plan/1"
    assert {layer["name"] for layer in told["layers"] if layer["scheme"] == "fp32"} == {"lm_head"}
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_leaves_nothing_behind(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError):
        cast(request(folder, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_was_scanned_is_not_scanned_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(tiny_llama, tmp_path / "out")

    def stopped(*arguments: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("llmopt.pipeline.cast.export_cast", stopped)
        with pytest.raises(KeyboardInterrupt):
            cast(asked)
    assert (journal_folder(asked.output) / RANGES).is_file()
    with monkeypatch.context() as patched:
        patched.setattr("llmopt.pipeline.cast.scan", stopped)
        cast(replace(asked, resume=Resume.REQUIRED))
    assert not journal_folder(asked.output).exists()
    cast(request(tiny_llama, tmp_path / "fresh"))
    names = ("model.onnx", "model.onnx.data")
    assert all((asked.output / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes() for name in names)


# What opens it.


def test_latency_is_not_measured_in_transformers(tiny_llama: Path, tmp_path: Path, llmopt: CommandLine) -> None:
    cast(request(tiny_llama, tmp_path / "out", format="hf"))
    ended = llmopt("bench", tmp_path / "out", "--baseline", tiny_llama)
    assert ended.code == ExitCode.USAGE
    assert "--no-latency" in ended.err


@pytest.mark.parametrize("format_", ["onnx", "hf"])
def test_a_cast_model_generates(tiny_llama: Path, format_: str, tmp_path: Path, llmopt: CommandLine) -> None:
    cast(request(tiny_llama, tmp_path / "out", format=format_))
    ended = llmopt("generate", tmp_path / "out", "abc", "--max-tokens", "8")
    assert ended.code == 0, ended.err
    assert ended.out == llmopt("generate", tiny_llama, "abc", "--max-tokens", "8").out


def test_a_recipe_casts_quantizes_and_measures(tiny_llama: Path, tmp_path: Path, llmopt: CommandLine) -> None:
    recipe = {
        "schema": "llmopt.recipe/1",
        "model": str(tiny_llama),
        "output": str(tmp_path / "out"),
        "steps": [
            {"cast": {"name": "half", "dtype": "bf16", "format": "hf", "calib_tokens": 512}},
            {"quantize": {"name": "int8"}},
        ],
        "bench": {"tokens": 512, "window": 64, "latency": False},
        "gates": ["size_bytes <= -30%"],
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    ended = llmopt("run", file, "--threads", "1")
    assert ended.code == 0, ended.err
    again = llmopt("run", file, "--threads", "1", "--dry-run")
    assert again.out.count("there already") == 2
    file.write_text(yaml.safe_dump(recipe | {"bench": {}}))
    ended = llmopt("run", file)
    assert ended.code == ExitCode.USAGE
    assert "latency: false" in ended.err


def test_a_plan_can_be_had_without_writing_anything(tiny_llama: Path, tmp_path: Path) -> None:
    prepared = prepare_cast(request(tiny_llama, tmp_path / "out", keep_fp32=("lm_head",)), Silent())
    plan = plan_cast(prepared, Silent())
    assert [choice.name for choice in plan.kept] == ["lm_head"]
    assert list(tmp_path.iterdir()) == []


def test_onnxruntime_genai_says_what_a_stream_says(tiny_llama: Path, tmp_path: Path) -> None:
    cast(request(tiny_llama, tmp_path / "out"))
    model = onnxruntime_genai.Model(str(tmp_path / "out"))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=TEXT.shape[1] + 12)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(TEXT[0].numpy())
    stream = OrtEngine(tmp_path / "out", threads=1).stream(capacity=TEXT.shape[1] + 12)
    ids = [*TEXT[0].tolist(), int(stream.feed(TEXT[0].numpy()).argmax())]
    while not generator.is_done():
        generator.generate_next_token()
        ids.append(int(stream.feed(np.array(ids[-1:])).argmax()) if len(ids) < TEXT.shape[1] + 12 else 0)
    said = generator.get_sequence(0).tolist()
    assert len(said) > TEXT.shape[1]
    assert said == ids[: len(said)]


def test_caches_of_two_dtypes_are_not_for_onnxruntime_genai(tiny_llama: Path, tmp_path: Path) -> None:
    result = cast(request(tiny_llama, tmp_path / "out", keep_fp32=("layers.0.self_attn.q_proj",)))
    assert not (tmp_path / "out" / "genai_config.json").exists()
    assert MIXED_CACHES in result.report.notes
