"""Tiny models of every family: configs as transformers writes them, and weights in which nothing is trivial."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from llmopt.model.families import spec_from_config
from llmopt.model.spec import ModelSpec, TensorSpec

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + index / 4 for index in range(6)],
    "long_factor": [9.0] * 6,
}
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 2000.0, "factor": 3.0},
}

CASES: Mapping[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**COMMON, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
    "llama, tied, wide heads": transformers.LlamaConfig(
        **COMMON, tie_word_embeddings=True, head_dim=24, rope_parameters=YARN
    ),
    "mistral": transformers.MistralConfig(**COMMON, sliding_window=7),
    "mistral, whole context": transformers.MistralConfig(**COMMON, sliding_window=None, head_dim=32),
    "qwen2": transformers.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": transformers.Qwen3Config(**COMMON, head_dim=24, attention_bias=True, tie_word_embeddings=True),
    "phi3": transformers.Phi3Config(
        **COMMON, sliding_window=9, rope_parameters=LONGROPE, original_max_position_embeddings=32
    ),
    "phi3, plain": transformers.Phi3Config(**COMMON, tie_word_embeddings=True, hidden_act="gelu"),
    "gemma3": transformers.Gemma3TextConfig(
        **COMMON,
        head_dim=24,
        query_pre_attn_scalar=40,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=GEMMA_ROPE,
        attention_bias=True,
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=48, n_inner=80, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt2, exact gelu": transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=2, n_positions=32, activation_function="gelu"
    ),
    "opt": transformers.OPTConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=80,
        max_position_embeddings=40,
    ),
    "opt, no biases, untied": transformers.OPTConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=80,
        max_position_embeddings=32,
        enable_bias=False,
        tie_word_embeddings=False,
    ),
}


@dataclass(frozen=True)
class Saved:
    """Tensors by the names of a checkpoint, read as one is."""

    tensors: Mapping[str, Tensor]

    def read(self, tensor: TensorSpec) -> Tensor:
        stored = self.tensors[tensor.name]
        assert tuple(stored.shape) == tensor.shape
        return stored

    def read_rows(self, tensor: TensorSpec, start: int, stop: int) -> Tensor:
        return self.read(tensor)[start:stop].clone()


def spec_of(config: transformers.PreTrainedConfig) -> ModelSpec:
    return spec_from_config(json.loads(config.to_json_string(use_diff=False)))


def random_weights(spec: ModelSpec, seed: int = 0) -> Saved:
    """Seeded; norms are not one and biases are not zero."""
    generator = torch.Generator().manual_seed(seed)
    norms = [*(norm for block in spec.blocks for norm in block.norms()), spec.final_norm]
    around_one = {f"{norm.name}.weight" for norm in norms if norm.offset == 0}  # Gemma's lie around zero
    tensors = {}
    for tensor in spec.tensors():
        noise = torch.randn(tensor.shape, generator=generator)
        spread = 0.15 if len(tensor.shape) == 2 else 0.3
        tensors[tensor.name] = noise * spread + (tensor.name in around_one)
    return Saved(tensors)
