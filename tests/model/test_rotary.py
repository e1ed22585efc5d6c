"""Rotary tables against transformers', kind by kind."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from llmopt.model.families import spec_from_config
from llmopt.model.rotary import REQUIRED, longest_sequence, supported_length, tables
from llmopt.model.spec import ModelSpec, Rotary

CONTEXT = 256
ORIGINAL = 64
KINDS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn, one of two weights": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "mscale": 0.7,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn, every option": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn, given attention factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "attention_factor": 1.5,
        "original_max_position_embeddings": ORIGINAL,
    },
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + pair / 10 for pair in range(12)],
    "long_factor": [3.0 + pair for pair in range(12)],
}
SIZES = {
    "vocab_size": 11,
    "hidden_size": 128,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": None,
}


def described(config: PreTrainedConfig) -> ModelSpec:
    return spec_from_config(json.loads(config.to_json_string()))


def rotary_of(config: PreTrainedConfig) -> Rotary:
    rotary = described(config).blocks[0].attention.rotary
    assert rotary is not None
    return rotary


def assert_same_tables(rotary: Rotary, reference: torch.nn.Module, length: int) -> None:
    """transformers repeats its tables for the second half of the pairs, and works in float32."""
    expected = reference(torch.zeros(1), torch.arange(length)[None])
    for ours, theirs in zip(tables(rotary, length, CONTEXT), expected, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(np.tile(ours, 2), theirs[0].numpy(), atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_transformers(kind: str) -> None:
    config = LlamaConfig(**SIZES, rope_parameters=KINDS[kind])
    assert_same_tables(rotary_of(config), LlamaRotaryEmbedding(config), CONTEXT)


def test_longrope_uses_the_short_factors_up_to_the_original_length() -> None:
    config = Phi3Config(**SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL)
    rotary = rotary_of(config)
    assert rotary.dim == 24
    assert_same_tables(rotary, Phi3RotaryEmbedding(config), ORIGINAL)


def test_longrope_serves_no_sequence_beyond_the_original_length() -> None:
    spec = described(Phi3Config(**SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL))
    rotary = spec.blocks[0].attention.rotary
    assert supported_length(rotary, CONTEXT) == ORIGINAL
    assert longest_sequence(spec) == ORIGINAL


def test_other_kinds_serve_the_whole_context() -> None:
    assert supported_length(None, CONTEXT) == CONTEXT
    assert supported_length(Rotary(dim=8, theta=1e4), CONTEXT) == CONTEXT


def test_every_kind_is_held_against_transformers() -> None:
    assert {*KINDS, "longrope"} >= set(REQUIRED)


def test_far_positions_keep_their_precision() -> None:
    """In float32 the angle of the fastest pair at position 100 000 would be off by 0.004."""
    cos_TR, sin_TR = tables(Rotary(dim=4, theta=1e4), 100_001, 131_072)
    assert cos_TR[100_000, 0] == pytest.approx(math.cos(100_000), abs=1e-7)
    assert sin_TR[100_000, 1] == pytest.approx(math.sin(1000), abs=1e-7)
