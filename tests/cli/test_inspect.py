"""`llmopt inspect` on folders that hold a config and nothing else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from llmopt.cli.inspect import inspect
from llmopt.cli.outcome import run
from llmopt.errors import ExitCode

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "sliding_window": 512,
}


def write(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write(tmp_path, CONFIG)


def llmopt_inspect(*arguments: str) -> int:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(inspect)
    return run(app, arguments)


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert llmopt_inspect(*arguments, "--json") == ExitCode.DONE
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_json_is_one_object_with_everything(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = as_json(capsys, model)
    assert result["schema"] == "llmopt.inspect/1"
    assert (result["model"], result["family"], result["blocks"]) == (model, "llama", 126)
    assert result["parameters"] == sum(part["parameters"] for part in result["parts"]) == 405_853_388_800
    assert result["size_bytes"] == 2 * result["parameters"]
    assert result["kv_cache"] == {
        "bytes_per_token": 516_096,
        "bytes_at_context": 2048 * 516_096,
        "windowed_blocks": 0,
    }
    assert result["prefill"]["tokens"] == result["context"] == 2048
    assert result["decode"]["flops_per_token"] == result["decode"]["flops"]
    legal = {entry["degree"]: entry["obstacle"] for entry in result["tensor_parallel"]}
    assert legal == {1: None, 2: None, 4: None, 8: None, 16: "8 key-value heads do not divide by 16"}
    assert result["quantizable"][1] == {
        "pattern": "model.layers.*.self_attn.q_proj",
        "kind": "linear",
        "count": 126,
        "out_features": 16384,
        "in_features": 16384,
        "tied": False,
        "parameters": 126 * 16384 * 16384,
    }
    assert [entry["scheme"] for entry in result["predicted_sizes"]][:3] == [
        "w8a16-g64-sym",
        "w8a8-channel-sym",
        "w4a16-g32-asym",
    ]
    assert {entry["tables"] for entry in result["predicted_sizes"]} == {"w8a16-g64-sym"}


def test_costs_are_given_at_the_context_asked_for(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = as_json(capsys, model, "--context", "100")
    assert result["kv_cache"]["bytes_at_context"] == 100 * 516_096


def test_the_summary_names_what_matters(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert llmopt_inspect(model, "--context", "1000") == ExitCode.DONE
    text = capsys.readouterr().out
    for words in (
        "LlamaForCausalLM, 405.9 billion parameters in bfloat16",
        "126 blocks of width 16384; 128 heads of 128, 8 for keys and values",
        "KV cache of 516 kB a token, 516 MB at 1000 tokens",
        "model.layers.*.mlp.down_proj",
        "16384 × 53248",
        "tensor-parallel degrees: 1, 2, 4, 8",
        "not 16: 8 key-value heads do not divide by 16",
        "w4a16-g32-asym",
    ):
        assert words in text


def test_windows_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path, GEMMA)
    assert llmopt_inspect(model) == ExitCode.DONE
    assert "5 of the blocks see the last 512 only" in capsys.readouterr().out


def test_a_context_that_the_model_lacks_is_a_usage_error(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert llmopt_inspect(model, "--context", "131073") == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--context" in captured.err


def test_an_unsupported_model_fails_without_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path, CONFIG | {"num_local_experts": 8})
    assert llmopt_inspect(model, "--json") == ExitCode.FAILED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "num_local_experts = 8" in captured.err


def test_sizes_are_those_that_quantize_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llmopt.pipeline.quantize import quantize
    from llmopt.pipeline.request import QuantizeRequest
    from llmopt.quantize.scheme import parse_scheme

    predicted = {entry["scheme"]: entry["size_bytes"] for entry in as_json(capsys, "demo")["predicted_sizes"]}
    scheme = parse_scheme("w4a16")
    quantize(QuantizeRequest(model="demo", output=tmp_path / "out", scheme=scheme))
    assert predicted[scheme.name] == pytest.approx((tmp_path / "out/model.onnx.data").stat().st_size, rel=0.001)


def test_neither_torch_nor_transformers_is_imported(model: str) -> None:
    program = f"""
import sys
from llmopt.cli.inspect import inspect
inspect({model!r}, json=True)
print(sorted({{"torch", "transformers", "onnx", "onnxruntime"}} & set(sys.modules)), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
    assert json.loads(result.stdout)["blocks"] == 126
