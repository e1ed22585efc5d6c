"""Peak resident memory and time of `llmopt quantize`: the reference model, and tiny models of 30 and of 120 blocks.

python -m benchmarks.memory
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmopt import demo
from llmopt.model.families import spec_from_config
from tests.reference import reference_model

SCHEMES = ("w8a16", "w4a16", "w8a8")


def tiny_model(folder: Path, blocks: int) -> Path:
    """The demo model's config with other numbers: width 64, `blocks` blocks, random weights, the demo's tokenizer."""
    config = json.loads((demo.folder() / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": blocks, "head_dim": 16}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo.folder() / name).read_bytes())
    generator = torch.Generator().manual_seed(0)
    spec = spec_from_config(config)
    weights = {tensor.name: torch.randn(tensor.shape, generator=generator) * 0.05 for tensor in spec.tensors()}
    save_file(weights, folder / "model.safetensors")
    return folder


def measure(model: Path, output: Path, scheme: str) -> tuple[float, float]:
    """Seconds and peak megabytes of one `llmopt quantize` process."""
    command = [sys.executable, "-m", "llmopt", "quantize", str(model), "-o", str(output), "--scheme", scheme, "-q"]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--threads", "2"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.perf_counter() - began, usage.ru_maxrss / 1000  # kilobytes on Linux


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {
            "reference": reference_model(),
            "30 blocks of width 64": tiny_model(folder / "tiny30", 30),
            "120 blocks of width 64": tiny_model(folder / "tiny120", 120),
        }
        for scheme in SCHEMES:
            for name, model in models.items():
                seconds, peak_mb = measure(model, folder / f"{model.name}-{scheme}", scheme)
                print(f"{name:24s} {scheme:8s} {seconds:6.1f} s   peak {peak_mb:7.0f} MB", flush=True)


if __name__ == "__main__":
    main()
