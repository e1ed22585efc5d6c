"""Gemma 3, text only.

Norms store their weight minus one and stand before and after each branch; the embedding is scaled by the root of the
width; five of six blocks see a window and turn their heads faster than the sixth, which sees everything.
"""

from collections.abc import Mapping, Sequence

from llmopt.model.families import Config, Family
from llmopt.model.families._config import activation, positive
from llmopt.model.families._decoder import (
    Identity,
    Shape,
    attention_inputs,
    attention_output,
    decoder,
    mlp_down,
    mlp_inputs,
)
from llmopt.model.families._gguf import Array
from llmopt.model.families._layer_types import FULL, SLIDING, windows
from llmopt.model.families._rope import rotary
from llmopt.model.spec import Attention, Block, Embedding, Mlp, ModelSpec, Norm, Rotary

_IDENTITY = Identity(family="gemma3", architecture="Gemma3ForCausalLM", genai_type="gemma3_text")
_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


def _spec(config: Config) -> ModelSpec:
    config = {**_DEFAULTS, **config}
    shape, layer_types = Shape.read(config), _layer_types(config)
    rotaries, seen = _rotaries(config, shape.head_dim), windows(config, layer_types)
    bias, scale = bool(config.get("attention_bias")), float(config["query_pre_attn_scalar"]) ** -0.5
    act = activation(config, "hidden_activation")

    def norm(name: str, size: int = shape.hidden) -> Norm:
        return Norm(name=name, size=size, eps=float(config["rms_norm_eps"]), offset=1.0)

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        return Block(
            index=index,
            attention_norm=norm(f"{prefix}.input_layernorm"),
            attention=Attention(
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                scale=scale,
                inputs=attention_inputs(shape, f"{prefix}.self_attn", bias=bias),
                output=attention_output(shape, f"{prefix}.self_attn", bias=bias),
                rotary=rotaries[layer_types[index]],
                q_norm=norm(f"{prefix}.self_attn.q_norm", shape.head_dim),
                k_norm=norm(f"{prefix}.self_attn.k_norm", shape.head_dim),
                window=seen[index],
            ),
            attention_post_norm=norm(f"{prefix}.post_attention_layernorm"),
            mlp_norm=norm(f"{prefix}.pre_feedforward_layernorm"),
            mlp=Mlp(inputs=mlp_inputs(shape, f"{prefix}.mlp"), down=mlp_down(shape, f"{prefix}.mlp"), activation=act),
            mlp_post_norm=norm(f"{prefix}.post_feedforward_layernorm"),
        )

    embedding = Embedding(
        name="model.embed_tokens",
        vocab_size=positive(config, "vocab_size"),
        width=shape.hidden,
        scale=shape.hidden**0.5,
    )
    return decoder(config, _IDENTITY, block=block, final_norm=norm("model.norm"), embedding=embedding)


def _layer_types(config: Config) -> Sequence[str]:
    """Older configs give a pattern: every sixth block sees everything."""
    pattern, blocks = positive(config, "sliding_window_pattern"), positive(config, "num_hidden_layers")
    types: Sequence[str] | None = config.get("layer_types")
    return types or [SLIDING if (index + 1) % pattern else FULL for index in range(blocks)]


def _rotaries(config: Config, head_dim: int) -> Mapping[str, Rotary]:
    """By type of block. Before transformers 5, `rope_scaling` meant the blocks that see everything."""
    by_type = config.get("rope_parameters") or {}
    if not by_type.keys() <= {FULL, SLIDING}:
        raise ValueError(f"rope_parameters has {', '.join(by_type)}, where it is sorted by {FULL} and {SLIDING}")
    full = {"rope_theta": config.get("rope_theta") or 1e6, **(by_type.get(FULL) or {})}
    local = {"rope_theta": config.get("rope_local_base_freq") or 1e4, **(by_type.get(SLIDING) or {})}
    given = {FULL: full | (config.get("rope_scaling") or {}), SLIDING: local}
    return {
        kind: rotary({**config, "rope_scaling": None, "rope_parameters": parameters}, head_dim)
        for kind, parameters in given.items()
    }


def _from_gguf(name: str, tensor: Array, config: Config) -> Array:
    """The converter adds the one that Gemma's norms leave out."""
    return tensor - 1 if name.endswith("norm.weight") else tensor


FAMILY = Family(name="gemma3", model_types=("gemma3_text",), spec=_spec, from_gguf=_from_gguf)
