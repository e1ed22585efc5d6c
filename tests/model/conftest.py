"""A Llama model of two tiny blocks, as a Hugging Face folder made in the test."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmopt.model.families import spec_from_config
from llmopt.model.spec import ModelSpec

LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.fixture
def spec() -> ModelSpec:
    """The model's description."""
    return spec_from_config(LLAMA)


@pytest.fixture
def weights(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Seeded float32 weights by name."""
    generator = torch.Generator().manual_seed(0)
    return {tensor.name: torch.randn(tensor.shape, generator=generator) for tensor in spec.tensors()}


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The model as `save_pretrained` would write it, in one file of float32."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    save_file(weights, path / "model.safetensors")
    return path
