"""Format hf: what is packed is what compressed-tensors packs, and transformers opens it and computes the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file, save_file
from transformers import OPTConfig

from llmopt.artifact import load_manifest
from llmopt.errors import LlmoptError, UnsupportedError, UsageError
from llmopt.model.families import spec_from_config
from llmopt.pipeline.formats.hf import HF
from llmopt.pipeline.prepare import prepare
from llmopt.pipeline.quantize import QuantizeResult, quantize
from llmopt.pipeline.request import QuantizeRequest
from llmopt.progress import Silent
from llmopt.quantize.assign import assign
from llmopt.quantize.pack import pack_words
from llmopt.quantize.scheme import parse_scheme
from tests.whole_way import CommandLine, bytes_of

SCHEMES = [
    "w2a16",
    "w2a16-asym",
    "w4a16",
    "w4a16-g64-sym",
    "w4a16-channel-asym",
    "w8a16",
    "w8a16-g32-asym",
    "w8a16-channel-sym",
    "w8a8",
]


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


@pytest.mark.parametrize(
    ("scheme", "overrides"),
    [
        ("w4a16-sym", {"down_proj": "w8a16"}),
        ("w4a16-sym", {"layers.0.*": "w8a16", "o_proj": "w8a8"}),
        ("w8a8", {"*.mlp.*": "w4a16-g64-sym"}),
        ("w8a16", {"down_proj": "w8a16-channel-sym"}),
    ],
)
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
def test_symmetric_schemes_mix(
    model: str, scheme: str, overrides: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    parsed = tuple((pattern, parse_scheme(text)) for pattern, text in overrides.items())
    result = written(request.getfixturevalue(model), tmp_path / "out", scheme, overrides=parsed)
    assert result.verification.exact.relative_error < 1e-5
    names = {layer.scheme for layer in result.report.candidates[0].layers}
    assert names == {None, parse_scheme(scheme).name, *(found.name for _, found in parsed)}


@pytest.mark.parametrize(
    ("scheme", "method"), [("w4a16", "smoothquant+gptq"), ("w4a16-sym", "awq+gptq"), ("w8a8", "smoothquant")]
)
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
def test_folded_weights_are_rounded_as_they_are_stored(
    model: str, scheme: str, method: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    result = written(folder, tmp_path / "out", scheme, method=method, calib_tokens=512)
    assert result.verification.exact.relative_error < 1e-5
    methods = [layer.method or "" for layer in result.report.candidates[0].layers]
    assert any("+" in found for found in methods), "nothing was folded"
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "out"))
    floats = [name for name in after if name in before and after[name].is_floating_point()]
    assert all(after[name].dtype == before[name].dtype for name in floats)
    assert any(not torch.equal(after[name], before[name]) for name in floats), "no fold reached a norm or a bias"


def test_a_recipe_writes_checkpoints_once(tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps = [
        {"name": "mixed", "format": "hf", "scheme": "w4a16-sym", "overrides": {"down_proj": "w8a16"}},
        {"name": "words", "format": "gptq", "scheme": "w4a16-sym", "method": "gptq", "calib_tokens": 512},
    ]
    recipe = {
        "schema": "llmopt.recipe/1",
        "model": str(tiny_llama),
        "output": str(tmp_path / "out"),
        "steps": [{"quantize": step} for step in steps],
    }
    file, llmopt = tmp_path / "recipe.yaml", CommandLine(capfd)
    file.write_text(yaml.safe_dump(recipe))
    assert llmopt("run", file).code == 0
    formats = {path.name: load_manifest(path).format for path in (tmp_path / "out").iterdir()}
    assert formats == {"mixed": "hf", "words": "gptq"}
    assert llmopt("run", file).err.count("kept") == 2
    file.write_text(yaml.safe_dump(recipe | {"bench": {}}))
    ended = llmopt("run", file)
    assert ended.code == 2
    assert "step mixed has format hf" in ended.err


def test_opt_has_no_range_of_each_token_in_transformers() -> None:
    spec = spec_from_config(OPTConfig(architectures=["OPTForCausalLM"]).to_dict())
    with pytest.raises(UnsupportedError, match="fc1 is to have w8a8"):
        HF.check_layers(spec, assign(spec, parse_scheme("w8a8"), tables=HF.tables))
    overrides = [("fc*", parse_scheme("w8a16"))]
    HF.check_layers(spec, assign(spec, parse_scheme("w8a8"), overrides, tables=HF.tables))


def test_a_weight_that_overflows_the_dtype_of_the_config_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = -1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight reaches 1e\+05.*float16"):
        written(folder, tmp_path / "out")


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
