"""OPT, in the order of computation that all sizes but 350m have: norms first, no projection around the embedding."""

from llmopt.model.families import Config, Family
from llmopt.model.families._config import activation, positive, require
from llmopt.model.families._decoder import Identity, decoder, equal_heads
from llmopt.model.spec import Attention, Block, Embedding, Linear, Mlp, ModelSpec, Norm, Positions

_IDENTITY = Identity(family="opt", architecture="OPTForCausalLM", genai_type="decoder")
_DEFAULTS = {
    "activation_function": "relu",
    "enable_bias": True,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
}
_POSITION_OFFSET = 2  # the first two rows of the table of positions stand for padding, as in fairseq


def _spec(config: Config) -> ModelSpec:
    config = {**_DEFAULTS, **config}
    hidden, heads, inner = (positive(config, key) for key in ("hidden_size", "num_attention_heads", "ffn_dim"))
    head_dim = equal_heads(hidden, heads)
    context, act = positive(config, "max_position_embeddings"), activation(config, "activation_function")
    require(config, "do_layer_norm_before", True)
    require(config, "_remove_final_layer_norm", False)
    require(config, "layer_norm_elementwise_affine", True)
    require(config, "word_embed_proj_dim", hidden, None)

    def norm(name: str) -> Norm:
        return Norm(name=name, size=hidden, eps=1e-5, kind="layer", bias=True)

    def linear(name: str, in_features: int, out_features: int) -> Linear:
        bias = bool(config["enable_bias"])
        return Linear(name=name, out_features=out_features, in_features=in_features, bias=bias)

    def block(index: int) -> Block:
        prefix = f"model.decoder.layers.{index}"
        return Block(
            index=index,
            attention_norm=norm(f"{prefix}.self_attn_layer_norm"),
            attention=Attention(
                heads=heads,
                kv_heads=heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                inputs=tuple(linear(f"{prefix}.self_attn.{side}_proj", hidden, hidden) for side in "qkv"),
                output=linear(f"{prefix}.self_attn.out_proj", hidden, hidden),
            ),
            mlp_norm=norm(f"{prefix}.final_layer_norm"),
            mlp=Mlp(
                inputs=(linear(f"{prefix}.fc1", hidden, inner),),
                down=linear(f"{prefix}.fc2", inner, hidden),
                activation=act,
                gated=False,
            ),
        )

    positions = Positions(
        name="model.decoder.embed_positions", rows=context + _POSITION_OFFSET, width=hidden, offset=_POSITION_OFFSET
    )
    embedding = Embedding(
        name="model.decoder.embed_tokens",
        vocab_size=positive(config, "vocab_size"),
        width=hidden,
        positions=positions,
    )
    final_norm = norm("model.decoder.final_layer_norm")
    return decoder(config, _IDENTITY, block=block, final_norm=final_norm, embedding=embedding)


FAMILY = Family(name="opt", model_types=("opt",), spec=_spec)
