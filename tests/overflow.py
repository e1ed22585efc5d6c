"""The embedded model with a residual stream that leaves float16 behind its first block, and the same function."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.source import open_source

FACTOR = 400.0  # one channel reaches 3e2 behind the first block without it; float16 ends at 65504


def plant_overflow(folder: Path) -> Path:
    """Write the model into `folder`: what is added to the stream is larger by a factor, which norms remove."""
    source = open_source("demo")
    spec = source.spec
    with open_checkpoint(source) as checkpoint:
        weights = {tensor.name: checkpoint.read(tensor) for tensor in spec.tensors()}
    head = weights[spec.head.weight.name].clone()
    for block in spec.blocks:
        for writer in (block.attention.output, block.mlp.down):
            weights[writer.weight.name] *= FACTOR
    weights[f"{spec.embedding.name}.weight"] *= FACTOR
    weights["lm_head.weight"] = head  # no longer tied: logits stay as they are
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = source.config | {"dtype": "float32", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert source.folder is not None
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source.folder / name, folder / name)
    return folder
