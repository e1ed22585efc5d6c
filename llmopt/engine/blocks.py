"""What a `ModelSpec` means, in plain torch: the reference that quantization and exports are held against.

Each function takes only the weights that it needs (as read from a checkpoint, by name), so that a model can run with
one block in memory. How a linear is applied is the caller's choice: quantized execution is another `Apply`.

Weights may be float32 or, in mixed precision, some of them 16 bits (see `in_own_dtype`): norms compute in float32 and
give the dtype of what they read, or float32 if their weight is; sums and products have the wider dtype of their sides.

Axes: B batch, T tokens, S tokens seen (past and new), H hidden, N heads, K key-value heads, D channels of a head,
R rotated pairs, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmopt.errors import UnsupportedError
from llmopt.model.rotary import longest_sequence, tables
from llmopt.model.spec import Activation, Attention, Block, Embedding, Linear, Mlp, ModelSpec, Norm, Rotary

Weights = Mapping[str, Tensor]
Apply = Callable[[Linear, Tensor], Tensor]
Turn = tuple[Tensor, Tensor]  # cosines and sines, [T, R] each

_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def plain(weights: Weights) -> Apply:
    """Linears as the checkpoint has them: y = x Wᵀ + b."""

    def apply(linear: Linear, x: Tensor) -> Tensor:
        weight = weights[linear.weight.name]
        bias = weights[f"{linear.name}.bias"] if linear.bias else None
        return functional.linear(x, weight.T if linear.transposed else weight, bias)

    return apply


def in_own_dtype(weights: Weights) -> Apply:
    """Linears of mixed precision: each casts its input to the dtype of its weight, [out, in], and gives that dtype.

    Sums are float32 inside, as kernels for 16 bits have it.
    """

    def apply(linear: Linear, x: Tensor) -> Tensor:
        weight = weights[linear.weight.name]
        bias = weights[f"{linear.name}.bias"].float() if linear.bias else None
        return functional.linear(x.to(weight.dtype).float(), weight.float(), bias).to(weight.dtype)

    return apply


@dataclass(slots=True)
class KvCache:
    """Keys and values of one block, [B, K, capacity, D] each, of which the first `length` tokens are filled."""

    keys_BKCD: Tensor
    values_BKCD: Tensor
    length: int = 0

    @classmethod
    def empty(cls, attention: Attention, batch: int, capacity: int) -> "KvCache":
        """Room for `capacity` tokens."""
        shape = (batch, attention.kv_heads, capacity, attention.head_dim)
        return cls(torch.zeros(shape), torch.zeros(shape))

    def append(self, keys_BKTD: Tensor, values_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens; gives those of all tokens so far."""
        stop = self.length + keys_BKTD.shape[2]
        self.keys_BKCD[:, :, self.length : stop] = keys_BKTD
        self.values_BKCD[:, :, self.length : stop] = values_BKTD
        self.length = stop
        return self.keys_BKCD[:, :, :stop], self.values_BKCD[:, :, :stop]


class RotaryTables:
    """The tables of every rotary embedding in a model, for positions below `length`.

    Raises:
        UnsupportedError: the model cannot read that many tokens.
    """

    def __init__(self, spec: ModelSpec, length: int) -> None:
        longest = longest_sequence(spec)
        if length > longest:
            raise UnsupportedError(f"a sequence of {length} tokens, where the model reads at most {longest}")
        distinct = {block.attention.rotary for block in spec.blocks} - {None}
        self._turns: dict[Rotary | None, Turn] = {}
        for rotary in distinct:
            assert rotary is not None
            cos_TR, sin_TR = tables(rotary, length, spec.context_length)
            self._turns[rotary] = torch.from_numpy(cos_TR), torch.from_numpy(sin_TR)

    def turn(self, block: Block, start: int, stop: int) -> Turn | None:
        """The rows for positions `start` to `stop` (exclusive); None for a block that does not rotate."""
        if block.attention.rotary is None:
            return None
        cos_TR, sin_TR = self._turns[block.attention.rotary]
        return cos_TR[start:stop], sin_TR[start:stop]


def embed(embedding: Embedding, weights: Weights, ids_BT: Tensor, start: int = 0) -> Tensor:
    """Hidden states [B, T, H] that enter the first block; `start` is the position of the first token."""
    hidden_BTH = functional.embedding(ids_BT, weights[f"{embedding.name}.weight"]) * embedding.scale
    if embedding.positions is not None:
        first = start + embedding.positions.offset
        hidden_BTH = hidden_BTH + weights[f"{embedding.positions.name}.weight"][first : first + ids_BT.shape[1]]
    return hidden_BTH


def block_forward(
    block: Block,
    weights: Weights,
    hidden_BTH: Tensor,
    turn: Turn | None,
    *,
    apply: Apply | None = None,
    cache: KvCache | None = None,
) -> Tensor:
    """Hidden states behind a block, [B, T, H].

    `turn` holds the rotation of these tokens' positions (None where the block does not rotate). Without `apply` the
    linears are taken from `weights`; with it, `weights` need hold the norms only. With a `cache` the tokens follow
    those in it and are appended to it.
    """
    apply = apply or plain(weights)
    branch = attend(
        block.attention, weights, normalize(block.attention_norm, weights, hidden_BTH), turn, apply=apply, cache=cache
    )
    if block.attention_post_norm is not None:
        branch = normalize(block.attention_post_norm, weights, branch)
    hidden_BTH = hidden_BTH + branch
    branch = feed_forward(block.mlp, normalize(block.mlp_norm, weights, hidden_BTH), apply)
    if block.mlp_post_norm is not None:
        branch = normalize(block.mlp_post_norm, weights, branch)
    return hidden_BTH + branch


def head_logits(spec: ModelSpec, weights: Weights, hidden_BTH: Tensor, *, apply: Apply | None = None) -> Tensor:
    """Logits [B, T, V] from the last block's hidden states: the final norm, then the head."""
    return (apply or plain(weights))(spec.head, head_inputs(spec, weights, hidden_BTH))


def head_inputs(spec: ModelSpec, weights: Weights, hidden_BTH: Tensor) -> Tensor:
    """What enters the head, [B, T, H]: the normed hidden states, behind the float product that there may be."""
    normed_BTH = normalize(spec.final_norm, weights, hidden_BTH)
    return normed_BTH if spec.before_head is None else plain(weights)(spec.before_head, normed_BTH)


def normalize(norm: Norm, weights: Weights, x: Tensor) -> Tensor:
    """RMS norm or layer norm over the last axis."""
    stored = weights[f"{norm.name}.weight"]
    dtype = torch.promote_types(x.dtype, stored.dtype)
    x, weight = x.float(), stored.float() + norm.offset
    bias = weights[f"{norm.name}.bias"].float() if norm.bias else None
    if norm.kind == "layer":
        return functional.layer_norm(x, (norm.size,), weight, bias, norm.eps).to(dtype)
    scaled = functional.rms_norm(x, (norm.size,), weight, norm.eps)
    return (scaled if bias is None else scaled + bias).to(dtype)


def feed_forward(mlp: Mlp, x: Tensor, apply: Apply) -> Tensor:
    """down(act(gate x) * up x), or down(act(up x)) without a gate."""
    return apply(mlp.down, activated(mlp, x, apply))


def activated(mlp: Mlp, x: Tensor, apply: Apply) -> Tensor:
    """What the last product of an MLP reads."""
    act = _ACTIVATIONS[mlp.activation]
    inner = torch.cat([apply(linear, x) for linear in mlp.inputs], dim=-1)
    if not mlp.gated:
        return act(inner)
    gate, up = inner.chunk(2, dim=-1)
    return act(gate) * up


def attend(
    attention: Attention,
    weights: Weights,
    x_BTH: Tensor,
    turn: Turn | None,
    *,
    apply: Apply,
    cache: KvCache | None = None,
) -> Tensor:
    """Causal grouped-query attention, [B, T, H] to [B, T, H]; see `block_forward` for the rest."""
    return apply(attention.output, mixed(attention, weights, x_BTH, turn, apply=apply, cache=cache))


def mixed(
    attention: Attention,
    weights: Weights,
    x_BTH: Tensor,
    turn: Turn | None,
    *,
    apply: Apply,
    cache: KvCache | None = None,
) -> Tensor:
    """What the last product of an attention reads: the values of all heads, mixed, [B, T, N D]."""
    batch, tokens, _ = x_BTH.shape
    qkv = torch.cat([apply(linear, x_BTH) for linear in attention.inputs], dim=-1)
    sizes = [attention.q_size, attention.kv_size, attention.kv_size]
    q_BNTD, k_BKTD, v_BKTD = (
        part.view(batch, tokens, -1, attention.head_dim).transpose(1, 2) for part in torch.split(qkv, sizes, dim=-1)
    )
    if attention.q_norm is not None:
        q_BNTD = normalize(attention.q_norm, weights, q_BNTD)
    if attention.k_norm is not None:
        k_BKTD = normalize(attention.k_norm, weights, k_BKTD)
    if turn is not None:
        q_BNTD, k_BKTD = rotate(q_BNTD, turn), rotate(k_BKTD, turn)
    k_BKSD, v_BKSD = (k_BKTD, v_BKTD) if cache is None else cache.append(k_BKTD, v_BKTD)
    mixed_BNTD = functional.scaled_dot_product_attention(
        q_BNTD,
        k_BKSD,
        v_BKSD,
        attn_mask=visible(tokens, k_BKSD.shape[2], attention.window, x_BTH.device),
        scale=attention.scale,
        enable_gqa=attention.heads != attention.kv_heads,
    )
    return mixed_BNTD.transpose(1, 2).reshape(batch, tokens, -1)


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Turn channel r with channel r + R, for r < R; channels from 2R on stay. `x` is [..., T, D]."""
    cos_TR, sin_TR = (table_TR.to(x.dtype) for table_TR in turn)
    pairs = cos_TR.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([first * cos_TR - second * sin_TR, second * cos_TR + first * sin_TR, rest], dim=-1)


def visible(tokens: int, seen: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Which of `seen` tokens each of the last `tokens` sees: itself and those before it, at most `window`; [T, S]."""
    place_S = torch.arange(seen, device=device)
    age_TS = place_S[seen - tokens :, None] - place_S[None, :]
    causal_TS = age_TS >= 0
    return causal_TS if window is None else causal_TS & (age_TS < window)
