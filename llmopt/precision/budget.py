"""What a mixed scheme may cost: bytes of the model files, bits a weight, or perplexity.

92MB              graph and weights together, as `llmopt bench` measures `size_bytes`
4.5bits           stored bits a weight, scales and zero points counted, over the table and every linear
+2% perplexity    how much higher than the float model's
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llmopt.errors import UsageError

HINT = "'92MB', '4.5bits' or '+2% perplexity'"
BYTES: Mapping[str, float] = {"kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MOST_BITS = 32.0

_NUMBER = r"(?P<number>\d+(?:\.\d*)?|\.\d+)"
_SIZE = re.compile(rf"{_NUMBER}\s*(?P<unit>{'|'.join(BYTES)})")
_BITS = re.compile(rf"{_NUMBER}\s*bits?")
_PERPLEXITY = re.compile(rf"\+{_NUMBER}\s*%(?:\s*perplexity)?")


@dataclass(frozen=True, slots=True)
class SizeBudget:
    """Model files of at most so many bytes."""

    model_bytes: int

    def __str__(self) -> str:
        return f"{self.model_bytes / 1e6:g}MB"


@dataclass(frozen=True, slots=True)
class BitsBudget:
    """At most so many stored bits a weight, on average over the table and every linear."""

    bits: float

    def __str__(self) -> str:
        return f"{self.bits:g}bits"


@dataclass(frozen=True, slots=True)
class PerplexityBudget:
    """A perplexity at most so much higher than the float model's: 0.02 for 2 %."""

    relative: float

    def __str__(self) -> str:
        return f"+{self.relative * 100:g}% perplexity"


Budget = SizeBudget | BitsBudget | PerplexityBudget


def parse_budget(text: str) -> Budget:
    """Read a budget.

    Raises:
        UsageError: it cannot be read, or is one that nothing or everything meets.
    """
    text = text.strip()
    if match := _SIZE.fullmatch(text):
        return SizeBudget(int(_positive(text, match) * BYTES[match["unit"]]))
    if match := _BITS.fullmatch(text):
        bits = _positive(text, match)
        if bits > MOST_BITS:
            raise UsageError(f"{text!r}: a weight has {MOST_BITS:g} bits before it is quantized", hint=HINT)
        return BitsBudget(bits)
    if match := _PERPLEXITY.fullmatch(text):
        return PerplexityBudget(_positive(text, match) / 100)
    raise UsageError(f"{text!r} is not a budget", hint=f"write {HINT}")


def _positive(text: str, match: re.Match[str]) -> float:
    number = float(match["number"])
    if number == 0:
        raise UsageError(f"{text!r}: a budget is more than nothing", hint=f"write {HINT}")
    return number
