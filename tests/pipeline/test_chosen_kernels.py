"""Kernels that were chosen, in the artifact, its manifest and its report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from llmopt.artifact import load_manifest
from llmopt.engine.ort import GENAI_CONFIG
from llmopt.errors import UsageError
from llmopt.export.card import Card, card_text
from llmopt.export.onnx.graph import GRAPH_FILE
from llmopt.measure import interleaved
from llmopt.pipeline.quantize import QuantizeResult, quantize
from llmopt.pipeline.request import QuantizeRequest
from llmopt.quantize.scheme import parse_scheme
from tests.whole_way import bytes_of

SECOND_FASTEST = 0.5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def float32_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second half of what is timed takes half of the time: kernels with float32 activations, pieces of a prompt."""

    def fastest_ms(calls: list, budget_s: float) -> list[float]:
        return [1.0 if place < len(calls) / 2 else SECOND_FASTEST for place in range(len(calls))]

    monkeypatch.setattr(interleaved, "fastest_ms", fastest_ms)


def quantized(model: Path, output: Path, **more: object) -> QuantizeResult:
    output.parent.mkdir(exist_ok=True)
    return quantize(QuantizeRequest(model=str(model), output=output, scheme=parse_scheme("w4a16"), **more))


def levels(folder: Path) -> set[int]:
    nodes = onnx.load(folder / GRAPH_FILE, load_external_data=False).graph.node
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    return {item.i for node in products for item in node.attribute if item.name == "accuracy_level"}


@pytest.mark.usefixtures("float32_is_fast")
def test_what_is_fast_is_written_and_told(tiny_llama: Path, tmp_path: Path) -> None:
    result = quantized(tiny_llama, tmp_path / "out")
    assert levels(tmp_path / "out") == {0}
    told = result.report.settings["kernels"]
    assert told["workload"] == {"prompt_tokens": 512, "output_tokens": 128}
    by_name = {choice["name"]: choice for choice in told["choices"]}
    assert by_name["w4a16-g32-asym, 64 to 128"] == {
        "name": "w4a16-g32-asym, 64 to 128",
        "chosen": "blocks of 32, float32 activations",
        "milliseconds": {"blocks of 32, int8 activations": 129.0, "blocks of 32, float32 activations": 64.5},
    }
    manifest = load_manifest(tmp_path / "out")
    assert manifest.tuning == {name: choice["chosen"] for name, choice in by_name.items()}
    assert manifest.kernels is not None
    assert manifest.kernels.startswith("measured on ")


def test_default_kernels_measure_nothing(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(interleaved, "fastest_ms")
    result = quantized(tiny_llama, tmp_path / "out", kernels="default")
    assert levels(tmp_path / "out") == {4}
    assert "kernels" not in result.report.settings
    assert not (tmp_path / "cache").exists()
    card = card_text(Card.of(result.manifest, {"architectures": ["LlamaForCausalLM"]}, result.report))
    assert "--kernels default" in card


def test_how_kernels_are_chosen_makes_another_artifact(tiny_llama: Path, tmp_path: Path) -> None:
    measured = quantized(tiny_llama, tmp_path / "measured").manifest
    default = quantized(tiny_llama, tmp_path / "default", kernels="default").manifest
    assert measured.key != default.key
    assert "kernels measured on" in measured.differs(default)
    assert replace(measured, tuning={}).key == measured.key
    other_threads = quantized(tiny_llama, tmp_path / "threads", threads=2).manifest
    assert other_threads.key != measured.key


@pytest.mark.usefixtures("float32_is_fast")
def test_a_second_run_writes_the_same_bytes_whatever_is_fast_by_then(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(tiny_llama, tmp_path / "a" / "out")
    monkeypatch.setattr(interleaved, "fastest_ms", lambda calls, budget_s: [1.0] * len(calls))
    quantized(tiny_llama, tmp_path / "b" / "out")
    assert bytes_of(tmp_path / "a" / "out") == bytes_of(tmp_path / "b" / "out")
    shutil.rmtree(tmp_path / "cache")
    quantized(tiny_llama, tmp_path / "c" / "out")
    assert levels(tmp_path / "c" / "out") == {4}


def long(model: Path, folder: Path) -> Path:
    """The same model, said to read more tokens."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder


@pytest.mark.usefixtures("float32_is_fast")
def test_a_prompt_is_cut_where_that_is_faster(tiny_llama: Path, tmp_path: Path) -> None:
    result = quantized(long(tiny_llama, tmp_path / "long"), tmp_path / "out")
    search = json.loads((tmp_path / "out" / GENAI_CONFIG).read_text())["search"]
    assert search["chunk_size"] == 128
    assert search["past_present_share_buffer"]
    assert "128" in result.manifest.tuning.values()


def test_a_prompt_is_read_in_one_where_that_is_as_fast(tiny_llama: Path, tmp_path: Path) -> None:
    result = quantized(long(tiny_llama, tmp_path / "long"), tmp_path / "out")
    assert "chunk_size" not in json.loads((tmp_path / "out" / GENAI_CONFIG).read_text())["search"]
    assert "whole" in result.manifest.tuning.values()


@pytest.mark.usefixtures("float32_is_fast")
@pytest.mark.parametrize(("context", "kernels"), [(256, None), (1024, "default")])
def test_pieces_are_not_tried_where_they_are_not_asked_for(
    context: int, kernels: str | None, tiny_llama: Path, tmp_path: Path
) -> None:
    model = tiny_llama if context == 256 else long(tiny_llama, tmp_path / "long")
    result = quantized(model, tmp_path / "out", kernels=kernels)
    assert "chunk_size" not in json.loads((tmp_path / "out" / GENAI_CONFIG).read_text())["search"]
    assert not any(name.startswith("prompt") for name in result.manifest.tuning)


@pytest.mark.parametrize(
    ("more", "told"),
    [({"kernels": "fast"}, "no 'fast' kernels"), ({"kernels": "measured", "format": "hf"}, "names no kernels")],
)
def test_what_cannot_be_chosen_is_refused(more: dict[str, object], told: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        quantized(tiny_llama, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()
