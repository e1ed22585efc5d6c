"""Format gptq: what is packed is what the layout says, and read back it computes what the quantized model computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3TextConfig, LlamaConfig

from llmopt.engine.gptq import GptqTensors
from llmopt.errors import UnsupportedError, UsageError, VerificationError
from llmopt.export.checkpoint.gptq import Gptq
from llmopt.model.families import spec_from_config
from llmopt.model.spec import Linear
from llmopt.pipeline.formats.gptq import GPTQ
from llmopt.pipeline.prepare import prepare
from llmopt.pipeline.quantize import QuantizeResult, quantize
from llmopt.pipeline.request import QuantizeRequest
from llmopt.progress import Silent
from llmopt.quantize.assign import assign
from llmopt.quantize.grid import ScaleRule
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from llmopt.quantize.weights import QuantizedWeight
from tests.whole_way import CommandLine, bytes_of

SCHEMES = ["w2a16", "w4a16-sym", "w4a16-g64-sym", "w4a16-channel-sym", "w8a16", "w8a16-g32-sym", "w8a16-channel-sym"]


def request(model: Path, output: Path, scheme: str = "w4a16-sym", **more: object) -> QuantizeRequest:
    return QuantizeRequest(model=str(model), output=output, scheme=parse_scheme(scheme), format="gptq", **more)


def written(model: Path, output: Path, scheme: str = "w4a16-sym", **more: object) -> QuantizeResult:
    return quantize(request(model, output, scheme, **more))


def quantized(out: int, inp: int, scheme: str) -> QuantizedWeight:
    weight = torch.randn((out, inp), generator=torch.Generator().manual_seed(0))
    rule = ScaleRule(signed=False, dtype=torch.float16)
    return Rtn(scales=rule).quantize(weight, parse_scheme(scheme))


def field(words: Tensor, index: int, bits: int) -> int:
    """The value number `index` of a row of int32 words, by plain arithmetic."""
    in_a_word = 32 // bits
    return (int(words[index // in_a_word]) % 2**32) // 2 ** (bits * (index % in_a_word)) % 2**bits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_is_where_the_layout_says(scheme: str) -> None:
    linear, weight = Linear(name="q", out_features=32, in_features=128), quantized(32, 128, scheme)
    bits, size = weight.scheme.bits, weight.scheme.group_size or 128
    tensors, expected = Gptq().tensors(linear, weight), weight.dequantize()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "q.qweight": (128 * bits // 32, 32),
        "q.qzeros": (128 // size, 32 * bits // 32),
        "q.scales": (128 // size, 32),
        "q.g_idx": (128,),
    }
    for row, column in [(0, 0), (0, 1), (1, 0), (5, 7), (17, 66), (31, 127)]:
        group = int(tensors["q.g_idx"][column])
        assert group == column // size
        code = field(tensors["q.qweight"][:, row], column, bits)
        zero = field(tensors["q.qzeros"][group], row, bits)
        assert zero == 2 ** (bits - 1) - 1
        assert (code - (zero + 1)) * float(tensors["q.scales"][group, row]) == expected[row, column]


def test_a_checkpoint_whose_inputs_are_out_of_order_is_read_by_its_groups(tiny_llama: Path, tmp_path: Path) -> None:
    written(tiny_llama, tmp_path / "out", "w8a16-g32-sym")
    layer, spec = "model.layers.0.self_attn.q_proj", prepare(request(tiny_llama, tmp_path / "x"), Silent()).source.spec
    linear = next(linear for linear in spec.linears() if linear.name == layer)
    with GptqTensors(tmp_path / "out") as tensors:
        before = tensors.read(linear.weight)
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    stored[f"{layer}.g_idx"] = stored[f"{layer}.g_idx"].flip(0).contiguous()
    save_file(stored, file)
    with GptqTensors(tmp_path / "out") as tensors:
        after = tensors.read(linear.weight)
    ratio = stored[f"{layer}.scales"].float()[[1, 0]].T / stored[f"{layer}.scales"].float().T
    assert torch.allclose(after, before * ratio.repeat_interleave(32, dim=1))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
def test_what_is_read_back_computes_what_the_quantized_model_computes(
    model: str, scheme: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    result = written(request.getfixturevalue(model), tmp_path / "out", scheme)
    assert result.verification.exact.relative_error < 1e-5
    layers = {layer.name: layer.scheme for layer in result.report.candidates[0].layers}
    name = parse_scheme(scheme).name
    assert {name for name, found in layers.items() if found is None} == {"model.embed_tokens", "lm_head"}
    assert set(layers.values()) == {None, name}


@pytest.mark.parametrize("method", ["search", "gptq", "smoothquant+gptq", "awq"])
def test_scales_are_positive_and_all_else_is_float16(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    written(tiny_llama, tmp_path / "out", method=method, calib_tokens=512)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = [tensor for name, tensor in tensors.items() if name.endswith(".scales")]
    assert len(scales) == 14
    assert all(bool((scale > 0).all()) for scale in scales)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.int32}


@pytest.mark.parametrize("changed", ["qweight", "qzeros", "scales"])
def test_a_checkpoint_that_computes_something_else_fails(
    tiny_llama: Path, tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = Gptq.tensors

    def wrong(self: Gptq, linear: Linear, weight: QuantizedWeight) -> dict[str, Tensor]:
        name = f"{linear.name}.{changed}"
        tensors = true(self, linear, weight)
        return tensors | {name: tensors[name] + torch.ones_like(tensors[name])}

    monkeypatch.setattr(Gptq, "tensors", wrong)
    with pytest.raises(VerificationError, match="differ"):
        written(tiny_llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_configs_say_how_to_read_it(tiny_llama: Path, tmp_path: Path) -> None:
    written(tiny_llama, tmp_path / "out", "w8a16-channel-sym")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = config["quantization_config"]
    assert said == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (
        said.items()
        >= {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": 8,
            "group_size": -1,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        }.items()
    )
    assert (config["torch_dtype"], config.get("dtype")) == ("float16", None)


def test_the_estimate_is_what_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    estimated = prepare(request(tiny_llama, tmp_path / "out"), Silent()).estimated_bytes
    written(tiny_llama, tmp_path / "out")
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + estimated


def test_the_same_input_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    first, second = (tmp_path / name / "model" for name in "ab")
    for folder in (first, second):
        folder.parent.mkdir()
        written(tiny_llama, folder)
    assert {name: content for name, content in bytes_of(first).items() if name != "report.json"} == {
        name: content for name, content in bytes_of(second).items() if name != "report.json"
    }


@pytest.mark.parametrize(
    ("scheme", "more", "word"),
    [
        ("w4a16", {}, "symmetric"),
        ("w8a16-asym", {}, "symmetric"),
        ("w8a8", {}, "float activations"),
        ("w4a16-sym", {"overrides": (("down_proj", parse_scheme("w8a16")),)}, "w4a16-g32-sym and w8a16-g64-sym"),
        ("w4a16-sym", {"ignore": ("layers.0.*",)}, "none and w4a16-g32-sym"),
        ("w4a16-sym", {"ignore": ("*_proj",)}, "none"),
        ("w4a16-sym", {"overrides": (("lm_head", parse_scheme("w8a16")),)}, "lm_head"),
    ],
)
def test_schemes_that_the_layout_cannot_hold_are_refused(
    tiny_llama: Path, tmp_path: Path, scheme: str, more: dict[str, object], word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        prepare(request(tiny_llama, tmp_path / "out", scheme, **more), Silent())


def test_a_weight_that_overflows_float16_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    for name, value in [("model.norm.weight", 7e4), ("model.layers.1.mlp.up_proj.weight", -7e4)]:
        folder = shutil.copytree(tiny_llama, tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[3] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UnsupportedError, match=f"{name} reaches .*float16"):
            written(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_family_that_overflows_float16_is_refused() -> None:
    spec = spec_from_config(Gemma3TextConfig(architectures=["Gemma3ForCausalLM"]).to_dict())
    with pytest.raises(UnsupportedError, match="gemma3's activations overflow") as caught:
        GPTQ.check(spec)
    assert caught.value.hint == "--format hf"


@pytest.mark.parametrize(("mlp", "scheme", "word"), [(80, "w4a16-channel-sym", "80"), (96, "w4a16-g64-sym", "groups")])
def test_linears_that_kernels_cannot_cut_are_refused(mlp: int, scheme: str, word: str) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=mlp, num_attention_heads=2, architectures=["LlamaForCausalLM"]
    )
    spec = spec_from_config(config.to_dict())
    with pytest.raises(UnsupportedError, match=word):
        GPTQ.check_layers(spec, assign(spec, parse_scheme(scheme), tables=GPTQ.tables))


@pytest.mark.parametrize("words", [("bench", "OUT", "--baseline", "MODEL"), ("generate", "OUT", "a")])
def test_commands_that_run_artifacts_say_what_opens_it(
    tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    written(tiny_llama, tmp_path / "out")
    paths = {"OUT": tmp_path / "out", "MODEL": tiny_llama}
    ended = CommandLine(capfd)(*(paths.get(word, word) for word in words))
    assert ended.code == 2
    assert "open it with GPTQModel or vLLM" in ended.err


def test_the_card_and_the_command_say_how_to_open_it(
    tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    llmopt = CommandLine(capfd)
    ended = llmopt("quantize", tiny_llama, "-o", tmp_path / "out", "--format", "gptq", "--scheme", "w4a16-sym")
    assert ended.code == 0
    assert f"next: vllm serve {tmp_path / 'out'}" in ended.out
    assert "llmopt bench" not in ended.out
    assert "as it ships: not run here" in ended.out
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for words in ("vllm serve .", "GPTQModel.load", "AutoModelForCausalLM", "- gptq", "--format gptq"):
        assert words in card
    assert "onnx" not in card.lower()
