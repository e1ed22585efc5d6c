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
from llmopt.pipeline.probing.blocks import Size, Stack, made_block, products_of
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
    """A block in float32, with new tokens behind others."""

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
        return ("float32", "bfloat16", "float16")
    return ("float32", "w8a8") if available() else ("float32",)


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


def block_seconds(stacks: Mapping[Size, Stack]) -> Iterator[tuple[Passed, float]]:
    """One sweep through all blocks."""
    for size, stack in stacks.items():
        for tokens, before in BLOCK_TOKENS:
            yield Passed(size=size, tokens=tokens, before=before), stack.seconds(tokens, before)


def computing(
    products: Mapping[Multiplied, float], blocks: Mapping[Passed, float], scratch_bytes: Mapping[str, float]
) -> Compute:
    """The speeds by which all of these seconds would be predicted best, and what a kind holds beside."""
    speeds = {
        kind: _speed({case: seconds for case, seconds in products.items() if case.kind == kind}).model_copy(
            update={"scratch_mb": size / _MEGA, "padded_to": PADDED_TO if kind == "w8a8" else 1}
        )
        for kind, size in scratch_bytes.items()
    }
    return Compute(speeds=speeds, rest=_rest(blocks, speeds["float32"]))


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
    """Blocks as they run, less their products."""
    rows: dict[str, list[float]] = {"launch": [], "pass": [], "attend": [], "cache": []}
    seconds: list[float] = []
    for case, whole_s in found.items():
        block, tokens, pairs = made_block(case.size), case.tokens, case.tokens * (case.tokens + case.before)
        rest_s = whole_s - sum(product_s(product, speed) for product in products_of(block, tokens))
        # Where products are nearly all of it, what is left of them is noise.
        seconds.append(max(rest_s, 0.02 * whole_s))
        rows["launch"].append(1.0)
        rows["pass"].append(passing_bytes(block, tokens, pairs, 4) * (tokens > 1))
        rows["attend"].append(4 * block.attention.q_size * pairs * (tokens > 1))
        rows["cache"].append(2 * block.attention.kv_size * (case.before + 1) * 4 * (tokens == 1))
    costs = fitted(rows, seconds)
    return Rest(
        launch_s=costs["launch"],
        passing_bytes_per_s=per_second(costs["pass"]),
        attention=Attending(
            tflops=(per_second(costs["attend"]) or speed.flops) / _TERA,
            gb_per_s=(per_second(costs["cache"]) or speed.bytes_per_s) / 1e9,
        ),
    )
