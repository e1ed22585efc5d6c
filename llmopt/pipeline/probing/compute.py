"""What a device takes for products and for the rest of a block, measured at several sizes and said by a few speeds.

Weights are more than caches hold, as those of a model are. The sizes are not those of any model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

import torch
from torch import Tensor

from llmopt.partition.device import Attending, Speed
from llmopt.partition.work import Product, passing_bytes, product_s
from llmopt.pipeline.probing.blocks import SIZES, Stack, products_of, scratch_bytes
from llmopt.pipeline.probing.fit import fitted, per_second
from llmopt.pipeline.probing.timing import median_s
from llmopt.quantize.int8 import quantize_rows
from llmopt.quantize.int8_torch import PADDED_TO, Int8Product, available
from llmopt.quantize.scheme import parse_scheme

SHAPES = ((512, 512), (2048, 512), (512, 2048), (1024, 1024), (4096, 1024), (2048, 2048))  # rows, columns
TOKENS = (1, 2, 4, 16, 64, 256)
BEYOND_CACHES_BYTES = 96 << 20
_LONG = 10  # times as long as other measurements: side by side, speeds come and go
_MANY = 8  # products of one shape in a row, where reading them is not what takes the time

Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """What a block takes beside its products."""

    launch_s: float
    passing_bytes_per_s: float | None
    attention: Attending


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """What was measured of one device: products by dtype or scheme, and the rest of a block."""

    speeds: dict[str, Speed]
    rest: Rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Working:
    """Seconds of a block for many tokens, for one, and for one where ranks take turns."""

    many_s: float
    token_s: float
    turn_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """A product of one shape."""

    rows: int
    columns: int
    tokens: int
    weight_bytes: int
    seconds: float


def kinds(device: torch.device) -> tuple[str, ...]:
    """Dtypes and schemes that the runtime computes with on a device."""
    if device.type == "cuda":
        return ("float32", "bfloat16", "float16")
    return ("float32", "w8a8") if available() else ("float32",)


def measure_compute(device: torch.device) -> Compute:
    """Measure a device; takes some seconds for each kind."""
    with torch.inference_mode():
        # Memory first, while the process has no other use for it.
        scratch = {kind: scratch_bytes(kind) if device.type == "cpu" else 0.0 for kind in kinds(device)}
        speeds = {
            kind: _speed(list(_timed(kind, device)), kind).model_copy(
                update={"scratch_mb": scratch[kind] / 1e6, "padded_to": PADDED_TO if kind == "w8a8" else 1}
            )
            for kind in kinds(device)
        }
        return Compute(speeds=speeds, rest=_rest(speeds["float32"], device))


def measure_working(device: torch.device, turn: Callable[[Callable[[], object]], float] | None = None) -> Working:
    """Measure what others may slow; `turn` is given work, has it done in turns, and says how long one took."""
    with torch.inference_mode():
        stack = Stack(SIZES[-1], device, BEYOND_CACHES_BYTES)
        token_s = stack.seconds(1, 255, _LONG)
        turn_s = token_s if turn is None else turn(stack.work(1, 255)) / stack.blocks
        return Working(many_s=stack.seconds(64, 192, _LONG), token_s=token_s, turn_s=turn_s)


def _timed(kind: str, device: torch.device) -> Iterator[_Timed]:
    for rows, columns in SHAPES:
        products, size_bytes = _products(kind, (rows, columns), device)
        for tokens in TOKENS:
            some = products if tokens < TOKENS[-2] else products[:_MANY]
            inputs = _inputs(kind, (rows, columns), tokens, device)
            yield _Timed(
                rows=rows,
                columns=columns,
                tokens=tokens,
                weight_bytes=size_bytes,
                seconds=_seconds(some, inputs, device),
            )


def _seconds(products: Sequence[Multiply], inputs: Tensor, device: torch.device) -> float:
    """Of one of several products, one behind the other."""

    def all_of_them() -> None:
        for product in products:
            product(inputs)

    return median_s(all_of_them, device) / len(products)


def _products(kind: str, shape: tuple[int, int], device: torch.device) -> tuple[Sequence[Multiply], int]:
    """As many products as no cache holds, and the bytes of one's weights."""
    weight_OI = torch.randn(shape)
    if kind == "w8a8":
        codes = quantize_rows(weight_OI, parse_scheme("w8a8"))
        size_bytes = Int8Product(codes).nbytes
        return [Int8Product(codes) for _ in range(BEYOND_CACHES_BYTES // size_bytes)], size_bytes
    weight_OI = weight_OI.to(device=device, dtype=_dtype(kind))
    copies = [weight_OI.clone() for _ in range(BEYOND_CACHES_BYTES // weight_OI.nbytes)]
    return [_linear(copy) for copy in copies], weight_OI.nbytes


def _linear(weight_OI: Tensor) -> Multiply:
    return lambda x: torch.nn.functional.linear(x, weight_OI)


def _inputs(kind: str, shape: tuple[int, int], tokens: int, device: torch.device) -> Tensor:
    return torch.randn(1, tokens, shape[1], device=device, dtype=_dtype(kind))


def _dtype(kind: str) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind, torch.float32)


def _speed(found: Sequence[_Timed], kind: str) -> Speed:
    """The speeds by which all of these would be predicted best."""
    value_bytes = _dtype(kind).itemsize
    one = [timed.tokens == 1 for timed in found]
    costs = fitted(
        {
            "call": [1.0] * len(found),
            "row": [timed.rows * alone for timed, alone in zip(found, one, strict=True)],
            "read": [timed.weight_bytes * alone for timed, alone in zip(found, one, strict=True)],
            "pack": [timed.weight_bytes * (not alone) for timed, alone in zip(found, one, strict=True)],
            "pass": [
                timed.tokens * (timed.rows + timed.columns) * value_bytes * (not alone)
                for timed, alone in zip(found, one, strict=True)
            ],
            "multiply": [
                2 * timed.tokens * timed.rows * timed.columns * (not alone)
                for timed, alone in zip(found, one, strict=True)
            ],
        },
        [timed.seconds for timed in found],
    )
    fastest = max(2 * timed.tokens * timed.rows * timed.columns / timed.seconds for timed in found)
    widest = max(timed.weight_bytes / timed.seconds for timed in found)
    speed = Speed(
        tflops=(per_second(costs["multiply"]) or fastest) / 1e12,
        gb_per_s=(per_second(costs["read"]) or widest) / 1e9,
        row_ns=1e9 * costs["row"],
        packing_gb_per_s=_giga(per_second(costs["pack"])),
        passing_gb_per_s=_giga(per_second(costs["pass"])),
        call_us=1e6 * costs["call"],
    )
    by_tokens = speed.model_copy(update={"factors": _factors(found, speed, value_bytes, by=lambda timed: timed.tokens)})
    alone = [timed for timed in found if timed.tokens == 1]
    return by_tokens.model_copy(
        update={"row_factors": _factors(alone, by_tokens, value_bytes, by=lambda timed: timed.columns)}
    )


def _factors(
    found: Sequence[_Timed], speed: Speed, value_bytes: int, by: Callable[[_Timed], int]
) -> list[tuple[int, float]]:
    """What was measured of what the speeds say, the geometric mean of all that are alike."""

    def off(timed: _Timed) -> float:
        product = Product(
            rows=timed.rows,
            columns=timed.columns,
            weight_bytes=timed.weight_bytes,
            tokens=timed.tokens,
            value_bytes=value_bytes,
        )
        return timed.seconds / product_s(product, speed)

    places = sorted({by(timed) for timed in found})
    return [(place, geometric_mean(off(timed) for timed in found if by(timed) == place)) for place in places]


def _giga(bytes_per_s: float | None) -> float | None:
    return None if bytes_per_s is None else bytes_per_s / 1e9


def _rest(speed: Speed, device: torch.device) -> Rest:
    """Blocks as they run, less their products."""
    rows: dict[str, list[float]] = {"launch": [], "pass": [], "attend": [], "cache": []}
    seconds: list[float] = []
    for size in SIZES:
        stack = Stack(size, device, BEYOND_CACHES_BYTES)
        attention = stack.block.attention
        for tokens, before in ((1, 60), (1, 500), (16, 240), (64, 448), (128, 0), (256, 0)):
            whole_s = stack.seconds(tokens, before)
            rest_s = whole_s - sum(product_s(product, speed) for product in products_of(stack.block, tokens))
            # Where products are nearly all of it, what is left of them is noise.
            seconds.append(max(rest_s, 0.02 * whole_s))
            pairs = tokens * (tokens + before)
            rows["launch"].append(1.0)
            rows["pass"].append(passing_bytes(stack.block, tokens, pairs, 4) * (tokens > 1))
            rows["attend"].append(4 * attention.q_size * pairs * (tokens > 1))
            rows["cache"].append(2 * attention.kv_size * (before + 1) * 4 * (tokens == 1))
    costs = fitted(rows, seconds)
    return Rest(
        launch_s=costs["launch"],
        passing_bytes_per_s=per_second(costs["pass"]),
        attention=Attending(
            tflops=(per_second(costs["attend"]) or speed.flops) / 1e12,
            gb_per_s=(per_second(costs["cache"]) or speed.bytes_per_s) / 1e9,
        ),
    )
