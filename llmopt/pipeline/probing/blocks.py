"""Blocks of made sizes, run as a stage runs them: what they take beside their products is read off the difference."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from statistics import geometric_mean

import torch
from torch import Tensor

from llmopt.engine.blocks import Apply, KvCache, Turn, block_forward, plain
from llmopt.measure.memory import give_back, resident_bytes
from llmopt.model.spec import Attention, Block, Linear, Mlp, Norm, Rotary
from llmopt.partition.work import Product, activation_bytes
from llmopt.pipeline.probing.timing import BEYOND_CACHES_BYTES, median_s, once_s
from llmopt.quantize.by_rows import rounded
from llmopt.quantize.int8_torch import Int8Product
from llmopt.quantize.scheme import parse_scheme

_CAPACITY = 520
_HEAD = 64
_FLOAT_BYTES = 4
_READ_BYTES = 16 << 20
FLOAT, W8A8 = "float32", "w8a8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a block: its width, its heads, and the channels of its MLP."""

    width: int
    heads: int
    kv_heads: int
    inner: int


SIZES = (Size(width=512, heads=8, kv_heads=4, inner=1536), Size(width=1024, heads=16, kv_heads=4, inner=2560))


class Stack:
    """Blocks of one size and kind, with more weights than caches hold."""

    def __init__(self, size: Size, kind: str, device: torch.device) -> None:
        self.block = made_block(size)
        self._device, self._size = device, size
        one_bytes = sum(_value_bytes(kind) * tensor.count for tensor in self.block.tensors())
        self._weights = [_made_weights(self.block, kind, device) for _ in range(BEYOND_CACHES_BYTES // one_bytes + 1)]
        self._caches = [made_cache(size, device) for _ in self._weights]

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self._weights)

    def seconds(self, tokens: int, before: int, times: int = 1) -> float:
        """Of one block, for new tokens of one sequence that has some already."""
        inputs = made_inputs(self._size, tokens, self._device)

        def all_of_them() -> None:
            for number in range(self.blocks):
                self._pass(number, inputs, before)

        return median_s(all_of_them, self._device, times) / self.blocks

    def few(self, count: int, before: int) -> Callable[[], list[float]]:
        """Work that passes a token through so many blocks, the next ones each time, and says what each of them took."""
        numbers, inputs = cycle(range(self.blocks)), made_inputs(self._size, 1, self._device)

        def step() -> list[float]:
            return [
                once_s(partial(self._pass, number, inputs, before), self._device) for number in islice(numbers, count)
            ]

        return step

    def _pass(self, number: int, inputs: tuple[Tensor, Turn], before: int) -> None:
        hidden_BTH, turn = inputs
        self._caches[number].length = before
        weights, apply = self._weights[number]
        block_forward(self.block, weights, hidden_BTH, turn, apply=apply, cache=self._caches[number])


def _made_weights(block: Block, kind: str, device: torch.device) -> tuple[dict[str, Tensor], Apply]:
    """What a block reads, and how its linears are applied."""
    weights = {tensor.name: torch.full(tensor.shape, 0.01, device=device) for tensor in block.tensors()}
    if kind != W8A8:
        return weights, plain(weights)
    products = {
        one.name: Int8Product(rounded(weights.pop(one.weight.name), parse_scheme(kind))) for one in block.linears()
    }
    return weights, lambda linear, x: products[linear.name](x)


def slack(kind: str, tokens: int = 256) -> float:
    """Of a block's activations: what a process comes to hold beside them. The sizes' geometric mean.

    Call it while the process has no other use for memory.
    """
    # Of allocations as large as one that was freed, glibc keeps what is freed; a model's weights are that when read.
    torch.ones(_READ_BYTES // _FLOAT_BYTES)
    return geometric_mean(1 + max(0.0, _held_beside(size, kind, tokens)) for size in SIZES) - 1


def _held_beside(size: Size, kind: str, tokens: int) -> float:
    """Beside what is counted of a block's activations, in parts of it."""
    block, device = made_block(size), torch.device("cpu")
    weights, apply = _made_weights(block, kind, device)
    hidden_BTH, turn = made_inputs(size, tokens, device)
    give_back()
    before = resident_bytes()
    for _ in range(3):
        cache = made_cache(size, device)
        block_forward(block, weights, hidden_BTH, turn, apply=apply, cache=cache)
    cached = 2 * block.attention.kv_size * tokens * _FLOAT_BYTES
    return (resident_bytes() - before - cached) / activation_bytes(block, tokens, tokens**2, _FLOAT_BYTES) - 1


def made_cache(size: Size, device: torch.device) -> KvCache:
    """An empty one."""
    room = (1, size.kv_heads, _CAPACITY, _HEAD)
    return KvCache(torch.zeros(room, device=device), torch.zeros(room, device=device))


def made_inputs(size: Size, tokens: int, device: torch.device) -> tuple[Tensor, Turn]:
    """Hidden states of one sequence, and no rotation."""
    hidden_BTH = torch.ones(1, tokens, size.width, device=device)
    return hidden_BTH, (torch.ones(tokens, _HEAD // 2, device=device), torch.zeros(tokens, _HEAD // 2, device=device))


def made_block(size: Size) -> Block:
    """A gated block with rotary embeddings, as most are."""

    def linear(name: str, rows: int, columns: int) -> Linear:
        return Linear(name=name, out_features=rows, in_features=columns)

    def norm(name: str) -> Norm:
        return Norm(name=name, size=size.width, eps=1e-6)

    q_size, kv_size = size.heads * _HEAD, size.kv_heads * _HEAD
    attention = Attention(
        heads=size.heads,
        kv_heads=size.kv_heads,
        head_dim=_HEAD,
        scale=_HEAD**-0.5,
        inputs=tuple(linear(name, rows, size.width) for name, rows in (("q", q_size), ("k", kv_size), ("v", kv_size))),
        output=linear("o", size.width, q_size),
        rotary=Rotary(dim=_HEAD, theta=1e4),
    )
    mlp = Mlp(
        inputs=(linear("gate", size.inner, size.width), linear("up", size.inner, size.width)),
        down=linear("down", size.width, size.inner),
        activation="silu",
    )
    return Block(index=0, attention_norm=norm("before"), attention=attention, mlp_norm=norm("between"), mlp=mlp)


def _value_bytes(kind: str) -> int:
    return 1 if kind == W8A8 else _FLOAT_BYTES


def products_of(block: Block, kind: str, tokens: int) -> Iterator[Product]:
    """Its products."""
    for linear in block.linears():
        yield Product(
            rows=linear.out_features,
            columns=linear.in_features,
            weight_bytes=_value_bytes(kind) * linear.out_features * linear.in_features,
            tokens=tokens,
            value_bytes=_FLOAT_BYTES,
        )
