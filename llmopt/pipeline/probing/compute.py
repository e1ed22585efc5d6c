"""What a device takes for products and for the rest of a block, measured at several sizes and said by a few speeds.

Weights are more than caches hold, as those of a model are. The sizes are not those of any model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

import torch
from torch import Tensor

from llmopt.partition.device import Attending, Factor, Speed
from llmopt.partition.work import Product, passing_bytes, product_s
from llmopt.pipeline.probing.blocks import FLOAT, W8A8, Size, Stack, made_block, products_of
from llmopt.pipeline.probing.fit import fitted, per_second
from llmopt.pipeline.probing.timing import BEYOND_CACHES_BYTES, median_s
from llmopt.quantize.int8 import quantize_rows
from llmopt.quantize.int8_torch import PADDED_TO, Int8Product, available
from llmopt.quantize.scheme import parse_scheme

# Rows and columns; the last is as large as a vocabulary's.
SHAPES = ((512, 512), (2048, 512), (512, 2048), (1024, 1024), (4096, 1024), (2048, 2048), (16384, 512))
TOKENS = (1, 2, 4, 16, 64, 256, 512)
BLOCK_TOKENS = ((1, 60), (1, 500), (16, 240), (64, 448), (128, 0), (256, 0))  # new ones, and those before
_ENOUGH_FLOPS = 1 << 32  # of products in a row, where reading them is not what takes the time
_LEAST_FACTOR = 0.5  # less is noise
_FLOAT_BYTES = 4
_MEGA, _TERA = 1e6, 1e12

Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiplied:
    """A product of a kind."""

    kind: str
    rows: int
    columns: int
    tokens: int
    weight_bytes: int

    @property
    def product(self) -> Product:
        """As costs have it."""
        return Product(
            rows=self.rows,
            columns=self.columns,
            weight_bytes=self.weight_bytes,
            tokens=self.tokens,
            value_bytes=_dtype(self.kind).itemsize,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """A block of a kind, with new tokens behind others."""

    kind: str
    size: Size
    tokens: int
    before: int


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


def kinds(device: torch.device) -> tuple[str, ...]:
    """Dtypes and schemes that the runtime computes with on a device."""
    if device.type == "cuda":
        return (FLOAT, "bfloat16", "float16")
    return (FLOAT, W8A8) if available() else (FLOAT,)


def product_seconds(device: torch.device) -> Iterator[tuple[Multiplied, float]]:
    """One sweep through all products."""
    for kind in kinds(device):
        for rows, columns in SHAPES:
            products, size_bytes = _products(kind, (rows, columns), device)
            for tokens in TOKENS:
                case = Multiplied(kind=kind, rows=rows, columns=columns, tokens=tokens, weight_bytes=size_bytes)
                few = max(1, int(_ENOUGH_FLOPS / case.product.flops))
                inputs = torch.randn(1, tokens, columns, device=device, dtype=_dtype(kind))
                yield case, _seconds(products[:few], inputs, device)


def block_kinds(device: torch.device) -> tuple[str, ...]:
    """Those in which blocks are measured too."""
    return tuple(kind for kind in kinds(device) if kind in (FLOAT, W8A8))


def block_seconds(stacks: Mapping[tuple[str, Size], Stack]) -> Iterator[tuple[Passed, float]]:
    """One sweep through all blocks."""
    for (kind, size), stack in stacks.items():
        for tokens, before in BLOCK_TOKENS:
            yield Passed(kind=kind, size=size, tokens=tokens, before=before), stack.seconds(tokens, before)


def computing(
    products: Mapping[Multiplied, float], blocks: Mapping[Passed, float], slacks: Mapping[str, float]
) -> Compute:
    """The speeds by which all of these seconds would be predicted best, with the slack of each kind."""
    speeds = {
        kind: _speed({case: seconds for case, seconds in products.items() if case.kind == kind}).model_copy(
            update={"slack": slack, "padded_to": PADDED_TO if kind == W8A8 else 1}
        )
        for kind, slack in slacks.items()
    }
    by_kind = {kind: {case: blocks[case] for case in blocks if case.kind == kind} for kind in speeds}
    rest = _rest(by_kind[FLOAT], speeds[FLOAT])
    speeds = {
        kind: speed.model_copy(update={"block_factors": _block_factors(by_kind[kind], speed, rest)})
        for kind, speed in speeds.items()
    }
    return Compute(speeds=speeds, rest=rest)


def _seconds(products: Sequence[Multiply], inputs: Tensor, device: torch.device) -> float:
    """Of one of several products, one behind the other."""

    def all_of_them() -> None:
        for product in products:
            product(inputs)

    return median_s(all_of_them, device) / len(products)


def _products(kind: str, shape: tuple[int, int], device: torch.device) -> tuple[Sequence[Multiply], int]:
    """As many products as no cache holds, and the bytes of one's weights."""
    weight_OI = torch.randn(shape)
    if kind == W8A8:
        codes = quantize_rows(weight_OI, parse_scheme(kind))
        size_bytes = Int8Product(codes).nbytes
        return [Int8Product(codes) for _ in range(_copies(size_bytes))], size_bytes
    weight_OI = weight_OI.to(device=device, dtype=_dtype(kind))
    return [_linear(weight_OI.clone()) for _ in range(_copies(weight_OI.nbytes))], weight_OI.nbytes


def _copies(size_bytes: int) -> int:
    return BEYOND_CACHES_BYTES // size_bytes + 1


def _linear(weight_OI: Tensor) -> Multiply:
    return lambda x: torch.nn.functional.linear(x, weight_OI)


def _dtype(kind: str) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kind, torch.float32)


def _speed(found: Mapping[Multiplied, float]) -> Speed:
    """The speeds by which all of these would be predicted best."""
    products = [case.product for case in found]
    alone = [product.tokens == 1 for product in products]
    costs = fitted(
        {
            "call": [1.0] * len(found),
            "row": [product.rows * one for product, one in zip(products, alone, strict=True)],
            "read": [product.weight_bytes * one for product, one in zip(products, alone, strict=True)],
            "pack": [product.weight_bytes * (not one) for product, one in zip(products, alone, strict=True)],
            "pass": [product.passing_bytes * (not one) for product, one in zip(products, alone, strict=True)],
            "multiply": [product.flops * (not one) for product, one in zip(products, alone, strict=True)],
        },
        list(found.values()),
    )
    fastest = max(case.product.flops / seconds for case, seconds in found.items())
    widest = max(case.weight_bytes / seconds for case, seconds in found.items())
    speed = Speed(
        tflops=(per_second(costs["multiply"]) or fastest) / _TERA,
        gb_per_s=(per_second(costs["read"]) or widest) / 1e9,
        row_ns=1e9 * costs["row"],
        packing_gb_per_s=_giga(per_second(costs["pack"])),
        passing_gb_per_s=_giga(per_second(costs["pass"])),
        call_us=1e6 * costs["call"],
    )
    speed = speed.model_copy(update={"factors": _factors(found, speed, by=lambda case: case.tokens)})
    one = {case: seconds for case, seconds in found.items() if case.tokens == 1}
    several = {case: seconds for case, seconds in found.items() if case.tokens > 1}
    return speed.model_copy(
        update={
            "row_factors": _factors(one, speed, by=lambda case: case.columns),
            "size_factors": _factors(several, speed, by=lambda case: round(case.weight_bytes / _MEGA, 1)),
        }
    )


def _factors(found: Mapping[Multiplied, float], speed: Speed, by: Callable[[Multiplied], float]) -> list[Factor]:
    """What was measured of what the speeds say, the geometric mean of all that are alike."""
    off: dict[float, list[float]] = {}
    for case, seconds in found.items():
        off.setdefault(by(case), []).append(seconds / product_s(case.product, speed))
    return [(place, geometric_mean(off[place])) for place in sorted(off)]


def _giga(bytes_per_s: float | None) -> float | None:
    return None if bytes_per_s is None else bytes_per_s / 1e9


def _rest(found: Mapping[Passed, float], speed: Speed) -> Rest:
    """What blocks in float32 take beside their products, which may take longer than by themselves."""
    blocks = [made_block(case.size) for case in found]
    pairs = [case.tokens * (case.tokens + case.before) for case in found]
    several = [case.tokens > 1 for case in found]
    products = [_products_s(case, speed) for case in found]
    costs = fitted(
        {
            "one": [seconds * (not many) for seconds, many in zip(products, several, strict=True)],
            "several": [seconds * many for seconds, many in zip(products, several, strict=True)],
            "launch": [1.0] * len(found),
            "pass": [
                passing_bytes(block, case.tokens, seen, _FLOAT_BYTES) * many
                for block, case, seen, many in zip(blocks, found, pairs, several, strict=True)
            ],
            "attend": [
                4 * block.attention.q_size * seen * many
                for block, seen, many in zip(blocks, pairs, several, strict=True)
            ],
            "cache": [
                2 * block.attention.kv_size * (case.before + 1) * _FLOAT_BYTES * (not many)
                for block, case, many in zip(blocks, found, several, strict=True)
            ],
        },
        list(found.values()),
    )
    return Rest(
        launch_s=costs["launch"],
        passing_bytes_per_s=per_second(costs["pass"]),
        attention=Attending(
            tflops=(per_second(costs["attend"]) or speed.flops) / _TERA,
            gb_per_s=(per_second(costs["cache"]) or speed.bytes_per_s) / 1e9,
        ),
    )


def _block_factors(found: Mapping[Passed, float], speed: Speed, rest: Rest) -> list[Factor]:
    """What products take within blocks, of what they take by themselves: the geometric mean of all blocks alike."""
    off: dict[int, list[float]] = {}
    for case, whole_s in found.items():
        products_s = _products_s(case, speed)
        within_s = whole_s - _rest_s(case, rest)
        off.setdefault(case.tokens, []).append(max(within_s / products_s, _LEAST_FACTOR))
    return [(tokens, geometric_mean(off[tokens])) for tokens in sorted(off)]


def _products_s(case: Passed, speed: Speed) -> float:
    return sum(product_s(product, speed) for product in products_of(made_block(case.size), case.kind, case.tokens))


def _rest_s(case: Passed, rest: Rest) -> float:
    block, pairs = made_block(case.size), case.tokens * (case.tokens + case.before)
    attention = block.attention
    if case.tokens == 1:
        return rest.launch_s + 2 * attention.kv_size * pairs * _FLOAT_BYTES / (rest.attention.gb_per_s * 1e9)
    passing = passing_bytes(block, case.tokens, pairs, _FLOAT_BYTES)
    passing_s = passing / rest.passing_bytes_per_s if rest.passing_bytes_per_s else 0.0
    return rest.launch_s + passing_s + 4 * attention.q_size * pairs / (rest.attention.tflops * _TERA)
