"""What a model costs, from its description alone: parameters, bytes, FLOPs and cache.

A multiply and an add count as two FLOPs. Norms, activations, rotary embedding and softmax are left out: they grow with
the width of the model where the products grow with its square. Bytes are those of the dtype that the config names, for
a batch of one; hidden states are left out, since they stay in the processor's cache.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from llmopt.errors import UnsupportedError
from llmopt.model.spec import Block, Linear, ModelSpec, TensorSpec

PartName = Literal["embedding", "attention", "mlp", "norms", "head"]

_DTYPE_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """How much of a model one kind of layer makes up."""

    name: PartName
    parameters: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What it takes to process `tokens` tokens in one go: operations, and bytes moved to and from memory."""

    tokens: int
    flops: int
    weight_bytes: int
    kv_bytes: int

    @property
    def flops_per_token(self) -> float:
        """Mean over the tokens."""
        return self.flops / self.tokens

    @property
    def bytes_per_token(self) -> float:
        """Mean over the tokens, weights and cache together."""
        return (self.weight_bytes + self.kv_bytes) / self.tokens


def dtype_bytes(spec: ModelSpec) -> int:
    """Bytes a parameter, as the config names its dtype.

    Raises:
        UnsupportedError: it is not one of float64, float32, bfloat16 and float16.
    """
    if spec.dtype not in _DTYPE_BYTES:
        raise UnsupportedError(f"dtype {spec.dtype!r} is not supported", hint=f"known: {', '.join(_DTYPE_BYTES)}")
    return _DTYPE_BYTES[spec.dtype]


def parts(spec: ModelSpec) -> tuple[Part, ...]:
    """Parameters and bytes by kind of layer. A tied head has none of its own: its table is the embedding's."""
    tensors: Mapping[PartName, Iterable[TensorSpec]] = {
        "embedding": spec.embedding.tensors(),
        "attention": (
            tensor
            for block in spec.blocks
            for linear in (*block.attention.inputs, block.attention.output)
            for tensor in linear.tensors()
        ),
        "mlp": (
            tensor
            for block in spec.blocks
            for linear in (*block.mlp.inputs, block.mlp.down)
            for tensor in linear.tensors()
        ),
        "norms": norm_tensors(spec),
        "head": spec.head.tensors(),
    }
    counts = {name: sum(tensor.count for tensor in of_part) for name, of_part in tensors.items()}
    size = dtype_bytes(spec)
    return tuple(Part(name=name, parameters=count, size_bytes=count * size) for name, count in counts.items())


def prefill(spec: ModelSpec, length: int) -> Work:
    """A prompt of `length` tokens, from an empty cache to the logits of its last token.

    FLOPs: 2 a weight and token in the blocks; 2 a weight of the head, once; and for attention 4 a channel of the
    queries (2 for q kᵀ, 2 for the mixing of v) and token seen, of which token t sees t, or the window.
    """
    blocks = sum(_flops_per_token(block.linears()) for block in spec.blocks) * length
    attention = sum(4 * block.attention.q_size * _seen_in_all(block, length) for block in spec.blocks)
    return Work(
        tokens=length,
        flops=blocks + attention + _flops_per_token([spec.head]),
        weight_bytes=_weight_bytes(spec, length),
        kv_bytes=kv_bytes_per_token(spec) * length,
    )


def decode(spec: ModelSpec, context: int) -> Work:
    """One token that sees `context` tokens, itself included: every weight is read once, and so is the cache."""
    products = sum(_flops_per_token(block.linears()) for block in spec.blocks) + _flops_per_token([spec.head])
    attention = sum(4 * block.attention.q_size * _seen(block, context) for block in spec.blocks)
    return Work(
        tokens=1,
        flops=products + attention,
        weight_bytes=_weight_bytes(spec, 1),
        kv_bytes=kv_bytes_at(spec, context),
    )


def kv_bytes_per_token(spec: ModelSpec) -> int:
    """What the cache grows by with each token: keys and values of every block (until a window is full)."""
    return sum(_kv_channels(block) for block in spec.blocks) * dtype_bytes(spec)


def kv_bytes_at(spec: ModelSpec, context: int) -> int:
    """Size of the cache behind `context` tokens, where a block with a window keeps no more than that."""
    return sum(_kv_channels(block) * _seen(block, context) for block in spec.blocks) * dtype_bytes(spec)


def norm_tensors(spec: ModelSpec) -> Iterator[TensorSpec]:
    """Weights and biases of every norm, the final one last."""
    for block in spec.blocks:
        for norm in block.norms():
            yield from norm.tensors()
    yield from spec.final_norm.tensors()


def _flops_per_token(linears: Iterable[Linear]) -> int:
    return sum(2 * linear.out_features * linear.in_features for linear in linears)


def _seen(block: Block, context: int) -> int:
    return context if block.attention.window is None else min(context, block.attention.window)


def _seen_in_all(block: Block, length: int) -> int:
    """Σ over t = 1 … length of the tokens that token t sees."""
    window = _seen(block, length)
    return window * (window + 1) // 2 + (length - window) * window


def _kv_channels(block: Block) -> int:
    return 2 * block.attention.kv_size


def _weight_bytes(spec: ModelSpec, tokens: int) -> int:
    """Blocks, final norm and head, once each; of the embedding and the positions, a row a token."""
    blocks = sum(tensor.count for block in spec.blocks for tensor in block.tensors())
    norm = sum(tensor.count for tensor in spec.final_norm.tensors())
    head = spec.head.weight.count + (spec.head.out_features if spec.head.bias else 0)
    rows = tokens * spec.embedding.width * (1 if spec.embedding.positions is None else 2)
    return (blocks + norm + head + rows) * dtype_bytes(spec)
