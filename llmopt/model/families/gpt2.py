"""GPT-2: learned positions, layer norms with bias, no gate, and linears stored as [in, out] ("Conv1D")."""

from llmopt.model.families import Config, Family
from llmopt.model.families._config import activation, positive
from llmopt.model.families._decoder import Identity, decoder, equal_heads
from llmopt.model.families._gguf import Array
from llmopt.model.spec import Attention, Block, Embedding, Linear, Mlp, ModelSpec, Norm, Positions

_IDENTITY = Identity(family="gpt2", architecture="GPT2LMHeadModel", genai_type="decoder")
_DEFAULTS = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "tie_word_embeddings": True,
}


def _spec(config: Config) -> ModelSpec:
    config = {**_DEFAULTS, **config}
    hidden, heads = positive(config, "n_embd"), positive(config, "n_head")
    head_dim = equal_heads(hidden, heads)
    inner = config.get("n_inner") or 4 * hidden
    act = activation(config, "activation_function")

    def norm(name: str) -> Norm:
        return Norm(name=name, size=hidden, eps=float(config["layer_norm_epsilon"]), kind="layer", bias=True)

    def conv1d(name: str, in_features: int, out_features: int) -> Linear:
        return Linear(name=name, out_features=out_features, in_features=in_features, bias=True, transposed=True)

    def block(index: int) -> Block:
        prefix = f"transformer.h.{index}"
        return Block(
            index=index,
            attention_norm=norm(f"{prefix}.ln_1"),
            attention=Attention(
                heads=heads,
                kv_heads=heads,
                head_dim=head_dim,
                scale=_attention_scale(config, head_dim, index),
                inputs=(conv1d(f"{prefix}.attn.c_attn", hidden, 3 * hidden),),
                output=conv1d(f"{prefix}.attn.c_proj", hidden, hidden),
            ),
            mlp_norm=norm(f"{prefix}.ln_2"),
            mlp=Mlp(
                inputs=(conv1d(f"{prefix}.mlp.c_fc", hidden, inner),),
                down=conv1d(f"{prefix}.mlp.c_proj", inner, hidden),
                activation=act,
                gated=False,
            ),
        )

    return decoder(
        config,
        _IDENTITY,
        block=block,
        final_norm=norm("transformer.ln_f"),
        embedding=Embedding(
            name="transformer.wte",
            vocab_size=positive(config, "vocab_size"),
            width=hidden,
            positions=Positions(name="transformer.wpe", rows=positive(config, "n_positions"), width=hidden),
        ),
        base_prefix="transformer.",
        blocks_key="n_layer",
        context_key="n_positions",
    )


def _attention_scale(config: Config, head_dim: int, index: int) -> float:
    scale: float = head_dim**-0.5 if config["scale_attn_weights"] else 1.0
    return scale / (index + 1) if config["scale_attn_by_inverse_layer_idx"] else scale


def _from_gguf(name: str, tensor: Array, config: Config) -> Array:
    """The converter stores every linear as [out, in]; its checkpoints have [in, out]."""
    conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return tensor.T if conv1d else tensor


FAMILY = Family(name="gpt2", model_types=("gpt2",), spec=_spec, from_gguf=_from_gguf)
