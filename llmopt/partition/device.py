"""A kind of device: what it has, and what it takes for the products, the attention and the rest of a block.

A cluster file says GB, TFLOPS, GB/s and microseconds; everywhere else there are bytes, operations and seconds. Only a
few of these numbers are on a data sheet: what is left out counts nothing, or as much as what is there.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from llmopt.errors import UsageError, near_match
from llmopt.quantize.scheme import parse_scheme
from llmopt.recipe.schema import Section

DTYPES = ("float32", "bfloat16", "float16", "float64")

MANY_TOKENS = 64  # at which `shared` is measured

_MEGA, _GIGA, _TERA, _MICRO = 1e6, 1e9, 1e12, 1e-6


def _known_kind(name: str) -> str:
    if name in DTYPES:
        return name
    try:
        parse_scheme(name)
    except UsageError as error:
        what = f"{name!r} is neither a dtype nor a scheme"
        hint = near_match(name, [*DTYPES, "w8a16", "w4a16", "w8a8"])
        raise PydanticCustomError("refused", "{what}", {"what": what, "hint": hint}) from error
    return name


# YAML's whole numbers are numbers too; infinities are none.
Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(gt=0, le=1)]
Kind = Annotated[str, AfterValidator(_known_kind)]


# YAML has no tuples.
Factor = Annotated[
    tuple[Annotated[int | float, Field(gt=0, allow_inf_nan=False)], Positive],
    Field(strict=False),
]


class Speed(Section):
    """Products with weights of one dtype or scheme: what a device reaches, not what its maker promises."""

    tflops: Positive
    """10¹² operations a second for many tokens at once."""
    gb_per_s: Positive
    """10⁹ bytes of weights a second for one token."""
    row_ns: NotNegative = 0.0
    """Nanoseconds that each row of a weight costs one token beside its bytes: short rows are read slower."""
    packing_gb_per_s: Positive | None = None
    """10⁹ bytes of weights a second that are put in order before they meet several tokens. null: while they do."""
    passing_gb_per_s: Positive | None = None
    """10⁹ bytes a second of what goes in and comes out, beside the operations. null: while they go on."""
    call_us: NotNegative = 0.0
    """Microseconds that a product takes whatever its size."""
    slack: NotNegative = 0.0
    """Of its activations: what a process comes to hold beside them, since memory is not given back at once."""
    padded_to: Annotated[int, Field(ge=1)] = 1
    """A weight has as many inputs in memory as the next multiple of this."""
    factors: list[Factor] = Field(default_factory=list)
    """[tokens, factor]: what a product of so many tokens takes of all that; between two of them by the logarithm."""
    row_factors: list[Factor] = Field(default_factory=list)
    """[inputs, factor]: what one token with rows of so many inputs takes beside, likewise."""
    block_factors: list[Factor] = Field(default_factory=list)
    """[tokens, factor]: what a product takes within a block, of what it takes by itself, likewise."""
    size_factors: list[Factor] = Field(default_factory=list)
    """[10⁶ bytes of weights, factor]: what several tokens take beside, likewise: small weights stay in caches."""

    @property
    def flops(self) -> float:
        """Operations a second."""
        return self.tflops * _TERA

    @property
    def bytes_per_s(self) -> float:
        """Bytes of weights a second."""
        return self.gb_per_s * _GIGA

    def block_factor(self, tokens: float) -> float:
        """What a product of so many tokens takes within a block, of what it takes by itself."""
        return _between(self.block_factors, tokens)

    def factor(self, tokens: float, columns: float, weight_bytes: float) -> float:
        """What a product of so many tokens with rows of so many takes, of what the other numbers say."""
        beside = (
            _between(self.row_factors, columns) if tokens == 1 else _between(self.size_factors, weight_bytes / _MEGA)
        )
        return _between(self.factors, tokens) * beside


def _between(factors: list[Factor], place: float) -> float:
    """Of the factors at some places that at another, by the logarithm; beyond the last it is that."""
    if not factors:
        return 1.0
    known, values = zip(*sorted(factors), strict=True)
    return float(np.interp(np.log(place), np.log(known), values))


class Attending(Section):
    """Queries against the cache, and the cache's values added up."""

    tflops: Positive
    """10¹² operations a second for many tokens at once, hidden ones among them."""
    gb_per_s: Positive
    """10⁹ bytes of the cache a second for one token."""


class Link(Section):
    """A message of n bytes takes latency + n / bandwidth."""

    latency_us: NotNegative
    """Microseconds until the first byte has arrived."""
    gb_per_s: Positive
    """10⁹ bytes a second behind it."""

    def seconds(self, size_bytes: float) -> float:
        """How long a message takes."""
        return self.latency_us * _MICRO + size_bytes / (self.gb_per_s * _GIGA)


class DeviceClass(Section):
    """Devices that are all alike."""

    memory_gb: Positive
    """10⁹ bytes that the device has."""
    reserved_gb: NotNegative = 0.0
    """What of it programs and drivers take before there is a model."""
    speeds: Annotated[dict[Kind, Speed], Field(min_length=1)]
    """By dtype, and by scheme where one was measured."""
    launch_us: NotNegative = 0.0
    """Microseconds that a block takes for getting under way, whatever its size."""
    attention: Attending | None = None
    """null: as fast as products of the dtype."""
    passing_gb_per_s: Positive | None = None
    """10⁹ bytes a second through norms, rotations, activations and sums. null: they take nothing."""
    shared: Share = 1.0
    """What a device keeps of its speed with many tokens while all of its machine work, who share caches and memory."""
    shared_token: Share = 1.0
    """The same with one token."""
    waking_us: NotNegative = 0.0
    """Microseconds that a token takes longer on a stage that has waited for others: a core that slept starts slowly."""
    expands: bool = False
    """Whether weights of schemes without a speed become floats in memory."""
    price_per_hour: NotNegative | None = None
    """Of one device, in any currency."""
    source: Literal["measured", "data sheet"] = "measured"
    """Where the numbers are from."""

    @property
    def usable_bytes(self) -> float:
        """Memory for a model."""
        return (self.memory_gb - self.reserved_gb) * _GIGA

    @property
    def launch_s(self) -> float:
        """Seconds a block takes for getting under way."""
        return self.launch_us * _MICRO

    @property
    def waking_s(self) -> float:
        """Seconds that a token takes longer on a stage that has waited."""
        return self.waking_us * _MICRO

    @model_validator(mode="after")
    def _has_room(self) -> "DeviceClass":
        if self.reserved_gb >= self.memory_gb:
            what = f"of {self.memory_gb:g} GB, {self.reserved_gb:g} are reserved: nothing is left for a model"
            raise PydanticCustomError("refused", "{what}", {"what": what, "hint": "lower reserved_gb"})
        return self
