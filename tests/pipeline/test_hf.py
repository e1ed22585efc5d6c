"""Format hf: what is packed is what compressed-tensors packs, and transformers opens it and computes the same."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file

from llmopt.errors import LlmoptError, UsageError
from llmopt.pipeline.quantize import QuantizeRequest, QuantizeResult, prepare, quantize
from llmopt.progress import Silent
from llmopt.quantize.pack import pack_words
from llmopt.quantize.scheme import parse_scheme
from tests.whole_way import CommandLine, bytes_of

SCHEMES = ["w4a16", "w4a16-g64-sym", "w4a16-channel-asym", "w8a16", "w8a16-g32-asym", "w8a16-channel-sym", "w8a8"]


def request(model: Path, output: Path, scheme: str = "w4a16-sym", **more: object) -> QuantizeRequest:
    return QuantizeRequest(model=str(model), output=output, scheme=parse_scheme(scheme), format="hf", **more)


def written(model: Path, output: Path, scheme: str = "w4a16-sym", **more: object) -> QuantizeResult:
    return quantize(request(model, output, scheme, **more))


@pytest.mark.parametrize(("bits", "columns"), [(4, 8), (4, 13), (8, 4), (8, 7)])
def test_words_are_those_of_compressed_tensors(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    packed = pack_words(codes, bits)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), signed)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
def test_transformers_computes_what_the_quantized_model_computes(
    model: str, scheme: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    result = written(request.getfixturevalue(model), tmp_path / "out", scheme)
    assert result.verification.exact.relative_error < 1e-5
    names = {layer.name: layer for layer in result.report.candidates[0].layers}
    assert names["lm_head"].scheme is None
    assert names["lm_head"].reason
    assert names["model.layers.1.mlp.down_proj"].scheme == parse_scheme(scheme).name


def test_scales_are_positive(tiny_llama: Path, tmp_path: Path) -> None:
    for method in ("rtn", "search", "gptq"):
        written(tiny_llama, tmp_path / method, method=method, **({} if method == "rtn" else {"calib_tokens": 512}))
        tensors = load_file(tmp_path / method / "model.safetensors")
        scales = [tensor for name, tensor in tensors.items() if name.endswith("weight_scale")]
        assert len(scales) == 14
        assert all(bool((scale > 0).all()) for scale in scales)


def test_the_same_input_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    first, second = (tmp_path / name / "model" for name in "ab")
    for folder in (first, second):
        folder.parent.mkdir()
        written(tiny_llama, folder)
    assert {name: content for name, content in bytes_of(first).items() if name != "report.json"} == {
        name: content for name, content in bytes_of(second).items() if name != "report.json"
    }


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"overrides": (("q_proj", parse_scheme("w8a16")),)}, "at once"),
        ({"ignore": ("up_proj",)}, "at once"),
        ({"overrides": (("lm_head", parse_scheme("w8a16")),)}, "lm_head"),
        ({"overrides": (("embed_tokens", parse_scheme("w8a16")),)}, "embed_tokens"),
        ({"ignore": ("*_proj",)}, "no layer"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    tiny_llama: Path, tmp_path: Path, more: dict[str, object], word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        prepare(request(tiny_llama, tmp_path / "out", **more), Silent())


def test_a_missing_package_is_named(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmopt.engine.transformers.PACKAGE", "no_such_package")
    with pytest.raises(LlmoptError) as caught:
        prepare(request(tiny_llama, tmp_path / "out"), Silent())
    assert caught.value.hint == "pip install 'llmopt[hf]'"


def test_bench_says_what_opens_it(tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written(tiny_llama, tmp_path / "out")
    ended = CommandLine(capfd)("bench", tmp_path / "out", "--baseline", tiny_llama)
    assert ended.code == 2
    assert "transformers" in ended.err


def test_the_card_says_how_to_open_it(tiny_llama: Path, tmp_path: Path) -> None:
    written(tiny_llama, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card
    assert "AutoModelForCausalLM" in card
    assert "onnx" not in card.lower()
