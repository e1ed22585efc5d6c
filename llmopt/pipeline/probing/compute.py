"""How fast a device multiplies, reads its memory, and gets a block of a model under way."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from llmopt.engine.blocks import KvCache, block_forward
from llmopt.model.spec import Attention, Block, Linear, Mlp, Norm
from llmopt.quantize.int8 import quantize_rows
from llmopt.quantize.int8_torch import Int8Product, available
from llmopt.quantize.scheme import parse_scheme

ROWS = 128  # tokens of a prompt that are multiplied at once
WIDTH, INNER = 1024, 3072
_BEYOND_CACHES_BYTES = 128 << 20
_SECONDS = 0.4  # for each measurement
_LEAST = 5
_TINY = 64

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of products with weights of one kind: operations a second for a prompt, bytes of weights a second for a token."""

    flops: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """What was measured of one device. `speeds` by dtype or scheme; `block_s` is what a block of no size takes."""

    speeds: dict[str, Speed]
    block_s: float


def kinds(device: torch.device) -> tuple[str, ...]:
    """Dtypes and schemes that the runtime computes with on a device."""
    if device.type == "cuda":
        return ("float32", "bfloat16", "float16")
    return ("float32", "w8a8") if available() else ("float32",)


def measure_compute(device: torch.device) -> Compute:
    """Measure a device; takes about a second for each kind."""
    with torch.inference_mode():
        return Compute(speeds={kind: _speed(kind, device) for kind in kinds(device)}, block_s=_block_s(device))


def _speed(kind: str, device: torch.device) -> Speed:
    products, size_bytes = _products(kind, device)
    prompt, token = (torch.randn(rows, WIDTH, device=device, dtype=_dtype(kind)) for rows in (ROWS, 1))
    prompt_s = _seconds(lambda: products[0](prompt), device)

    def read_all() -> None:
        for product in products:
            product(token)

    return Speed(
        flops=2 * ROWS * WIDTH * INNER / prompt_s, bytes_per_s=size_bytes * len(products) / _seconds(read_all, device)
    )


def _products(kind: str, device: torch.device) -> tuple[Sequence[Product], int]:
    """As many products as no cache holds, and the bytes of one's weights."""
    weight_OI = torch.randn(INNER, WIDTH)
    if kind == "w8a8":
        codes = quantize_rows(weight_OI, parse_scheme("w8a8"))
        count = _BEYOND_CACHES_BYTES // Int8Product(codes).nbytes
        packed = [Int8Product(codes) for _ in range(count)]
        return packed, packed[0].nbytes
    weight_OI = weight_OI.to(device=device, dtype=_dtype(kind))
    copies = [weight_OI.clone() for _ in range(_BEYOND_CACHES_BYTES // weight_OI.nbytes)]
    return [_linear(copy) for copy in copies], weight_OI.nbytes


def _linear(weight_OI: Tensor) -> Product:
    return lambda x: torch.nn.functional.linear(x, weight_OI)


def _dtype(kind: str) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind, torch.float32)


def _block_s(device: torch.device) -> float:
    """A token through a block so small that all of its time is what calls cost."""
    block = _tiny_block()
    weights = {tensor.name: torch.ones(tensor.shape, device=device) for tensor in block.tensors()}
    cache = KvCache(torch.zeros(1, 1, _TINY, _TINY, device=device), torch.zeros(1, 1, _TINY, _TINY, device=device))
    hidden_BTH = torch.ones(1, 1, _TINY, device=device)
    turn = torch.ones(1, _TINY // 2, device=device), torch.ones(1, _TINY // 2, device=device)

    def step() -> None:
        cache.length = 32
        block_forward(block, weights, hidden_BTH, turn, cache=cache)

    return _seconds(step, device)


def _tiny_block() -> Block:
    def linear(name: str) -> Linear:
        return Linear(name=name, out_features=_TINY, in_features=_TINY)

    def norm(name: str) -> Norm:
        return Norm(name=name, size=_TINY, eps=1e-6)

    inputs = (linear("q"), linear("k"), linear("v"))
    attention = Attention(heads=1, kv_heads=1, head_dim=_TINY, scale=0.1, inputs=inputs, output=linear("o"))
    mlp = Mlp(inputs=(linear("gate"), linear("up")), down=linear("down"), activation="silu")
    return Block(index=0, attention_norm=norm("before"), attention=attention, mlp_norm=norm("between"), mlp=mlp)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of as many calls as there is time for, behind one that is not counted."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    found: list[float] = []
    while len(found) < _LEAST or sum(found) < _SECONDS:
        found.append(once())
    return median(found)
