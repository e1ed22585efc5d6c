"""What most decoders share: pre-norm blocks of grouped-query attention and a gated MLP, with the names of Llama's.

A family says what sets it apart as a `Style`; `llama_like` does the rest. Those that differ in more than that (Gemma's
norms, GPT-2's names) put the same parts together themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmopt.model.families import Config
from llmopt.model.families._config import activation, dtype, eos_token_ids, positive, require, require_causal_lm
from llmopt.model.families._rope import rotary
from llmopt.model.spec import Attention, Block, Embedding, Linear, Mlp, ModelSpec, Norm

Window = int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What the world calls a family: transformers' class, and onnxruntime-genai's type (None: it has none)."""

    family: str
    architecture: str
    genai_type: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What sets one Llama-like family apart from the next.

    `fused` stores q, k, v as one linear and gate, up as another. `windows` holds a window for each block.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    fused: bool = False
    partial_rotary: bool = False
    windows: Sequence[Window] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a decoder, in channels; `heads` and `kv_heads` count heads."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    @classmethod
    def read(cls, config: Config) -> "Shape":
        """From the keys that Llama-like configs share; `num_key_value_heads` and `head_dim` may be missing or null.

        Raises:
            KeyError: a size is missing.
            ValueError: a size is not a positive number, or the heads do not divide into groups.
        """
        hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
        kv_heads = positive(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
        given = config.get("head_dim") is not None
        head_dim = positive(config, "head_dim") if given else equal_heads(hidden, heads)
        if heads % kv_heads:
            raise ValueError(f"{heads} attention heads do not divide into {kv_heads} groups")
        mlp = positive(config, "intermediate_size")
        return cls(hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, mlp=mlp)


def llama_like(config: Config, identity: Identity, style: Style) -> ModelSpec:
    """A model with Llama's names and order of computation.

    Raises:
        KeyError, ValueError: the config lacks a key, or says something impossible.
        UnsupportedError: it asks for something that a spec cannot say.
    """
    shape = Shape.read(config)
    _refuse_other_biases(config, style)
    eps = float(config["rms_norm_eps"])
    rope = rotary(config, shape.head_dim, partial=style.partial_rotary)
    windows = style.windows or [None] * positive(config, "num_hidden_layers")
    act = activation(config, "hidden_act")

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        head_norm = {
            side: Norm(name=f"{prefix}.self_attn.{side}", size=shape.head_dim, eps=eps) if style.head_norms else None
            for side in ("q_norm", "k_norm")
        }
        return Block(
            index=index,
            attention_norm=Norm(name=f"{prefix}.input_layernorm", size=shape.hidden, eps=eps),
            attention=Attention(
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                scale=shape.head_dim**-0.5,
                inputs=attention_inputs(shape, f"{prefix}.self_attn", bias=style.qkv_bias, fused=style.fused),
                output=attention_output(shape, f"{prefix}.self_attn", bias=style.output_bias),
                rotary=rope,
                window=windows[index],
                **head_norm,
            ),
            mlp_norm=Norm(name=f"{prefix}.post_attention_layernorm", size=shape.hidden, eps=eps),
            mlp=Mlp(
                inputs=mlp_inputs(shape, f"{prefix}.mlp", bias=style.mlp_bias, fused=style.fused),
                down=mlp_down(shape, f"{prefix}.mlp", bias=style.mlp_bias),
                activation=act,
            ),
        )

    norm = Norm(name="model.norm", size=shape.hidden, eps=eps)
    return decoder(config, identity, block=block, final_norm=norm)


def _refuse_other_biases(config: Config, style: Style) -> None:
    if not style.qkv_bias:
        require(config, "attention_bias", False, None)
    if not style.mlp_bias:
        require(config, "mlp_bias", False, None)


def decoder(
    config: Config,
    identity: Identity,
    *,
    block: Callable[[int], Block],
    final_norm: Norm,
    embedding: Embedding | None = None,
    base_prefix: str = "model.",
    blocks_key: str = "num_hidden_layers",
    context_key: str = "max_position_embeddings",
) -> ModelSpec:
    """Everything around the blocks. Without an `embedding` it is the plain one that Llama-like checkpoints hold.

    Raises:
        KeyError, ValueError: the config lacks a key, or says something impossible.
        UnsupportedError: it asks for something that a spec cannot say.
    """
    require_causal_lm(config, identity.architecture)
    hidden = final_norm.size
    table = embedding or Embedding(name="model.embed_tokens", vocab_size=positive(config, "vocab_size"), width=hidden)
    tied_to = table.name if config["tie_word_embeddings"] else None
    return ModelSpec(
        family=identity.family,
        architecture=identity.architecture,
        hidden_size=hidden,
        context_length=positive(config, context_key),
        embedding=table,
        blocks=tuple(block(index) for index in range(positive(config, blocks_key))),
        final_norm=final_norm,
        head=Linear(name="lm_head", out_features=table.vocab_size, in_features=hidden, tied_to=tied_to),
        dtype=dtype(config),
        base_prefix=base_prefix,
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=eos_token_ids(config),
        pad_token_id=config.get("pad_token_id"),
        genai_type=identity.genai_type,
    )


def attention_inputs(shape: Shape, prefix: str, *, bias: bool = False, fused: bool = False) -> tuple[Linear, ...]:
    """q_proj, k_proj and v_proj, or qkv_proj."""
    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"qkv_proj": q_size + 2 * kv_size} if fused else {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
    return tuple(
        Linear(name=f"{prefix}.{name}", out_features=size, in_features=shape.hidden, bias=bias)
        for name, size in sizes.items()
    )


def attention_output(shape: Shape, prefix: str, *, bias: bool = False, name: str = "o_proj") -> Linear:
    """From the heads, side by side, back to the width of the model."""
    in_features = shape.heads * shape.head_dim
    return Linear(name=f"{prefix}.{name}", out_features=shape.hidden, in_features=in_features, bias=bias)


def mlp_inputs(shape: Shape, prefix: str, *, bias: bool = False, fused: bool = False) -> tuple[Linear, ...]:
    """gate_proj and up_proj, or gate_up_proj."""
    sizes = {"gate_up_proj": 2 * shape.mlp} if fused else {"gate_proj": shape.mlp, "up_proj": shape.mlp}
    return tuple(
        Linear(name=f"{prefix}.{name}", out_features=size, in_features=shape.hidden, bias=bias)
        for name, size in sizes.items()
    )


def mlp_down(shape: Shape, prefix: str, *, bias: bool = False) -> Linear:
    """down_proj."""
    return Linear(name=f"{prefix}.down_proj", out_features=shape.hidden, in_features=shape.mlp, bias=bias)


def equal_heads(hidden: int, heads: int) -> int:
    """Channels of a head where the heads share out the width of the model.

    Raises:
        ValueError: they do not share it equally.
    """
    if hidden % heads:
        raise ValueError(f"a width of {hidden} does not divide into {heads} attention heads")
    return hidden // heads


def window_of(config: Config, key: str = "sliding_window") -> Window:
    """How many tokens a query sees, itself included; None where that is the whole context."""
    window = config.get(key)
    return window if window is not None and window < positive(config, "max_position_embeddings") else None
