"""Peak resident memory of `llmopt quantize`, beside what it predicts, and its time.

The embedded model, the reference model, and tiny models of 30 and of 120 blocks, whose weights are next to nothing.

python -m benchmarks.memory
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmopt import demo
from llmopt.model.families import spec_from_config
from tests.reference import reference_model

KINDS = (
    ("--scheme", "w8a16"),
    ("--scheme", "w8a8"),
    ("--scheme", "w4a16-sym", "--method", "gptq", "--calib-tokens", "4096"),
    ("--scheme", "w4a16", "--format", "hf"),
)


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


def measure(model: str, output: Path, options: Sequence[str]) -> tuple[float, float, float]:
    """Seconds, and peak megabytes as predicted and as measured, of one `llmopt quantize` process."""
    command = [sys.executable, "-m", "llmopt", "quantize", model, "-o", str(output), *options, "--json", "-q"]
    began = time.perf_counter()
    done = subprocess.run([*command, "--threads", "2"], stdout=subprocess.PIPE, check=True)
    seconds, memory = time.perf_counter() - began, json.loads(done.stdout)["memory"]
    return seconds, memory["predicted_bytes"] / 1e6, memory["peak_bytes"] / 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {
            "demo": "demo",
            "30 blocks of width 64": str(tiny_model(folder / "tiny30", 30)),
            "120 blocks of width 64": str(tiny_model(folder / "tiny120", 120)),
            "reference": str(reference_model()),
        }
        for options, (name, model) in product(KINDS, models.items()):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                seconds, predicted_mb, peak_mb = measure(model, Path(place) / "out", options)
            told = f"{name:24s} {' '.join(options):56s} {seconds:6.1f} s"
            ratio = peak_mb / predicted_mb
            print(f"{told}   predicted {predicted_mb:6.0f} MB   peak {peak_mb:6.0f} MB   {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
