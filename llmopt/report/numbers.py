"""Numbers as people read them: four digits, a unit, and an interval in the digits of its number."""

import math

from llmopt.report.results import Delta, Measurement

MISSING = "—"
DIGITS = 4
SHARES = frozenset({"top1_agreement"})
BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
SILENT_UNITS = frozenset({"1", "nats"})  # titles name them, or there is none
SMALLEST = 1e-5  # below it, digits behind the point say less than a power of ten


def value_text(metric: str, measured: Measurement | None) -> str:
    """Such as `28.70`, `134.5 MB` or `98.21 %`."""
    if measured is None:
        return MISSING
    factor, unit = _scale(metric, measured)
    number = measured.value * factor
    return f"{number:{_format(number)}}{f' {unit}' if unit else ''}"


def interval_text(metric: str, measured: Measurement | None) -> str:
    """Such as `[27.91, 29.52]`, in the unit of the value; empty without an interval."""
    if measured is None or measured.low is None or measured.high is None:
        return ""
    factor, _ = _scale(metric, measured)
    form = _format(measured.value * factor)
    return f"[{measured.low * factor:{form}}, {measured.high * factor:{form}}]"


def change_text(delta: Delta | None) -> str:
    """Such as `+0.03 %`."""
    return MISSING if delta is None else f"{100 * delta.relative:+.{_change_decimals(delta)}f} %"


def change_interval_text(delta: Delta | None) -> str:
    """Such as `[+0.01, +0.05]`, in percent; empty without an interval."""
    if delta is None or delta.low is None or delta.high is None:
        return ""
    decimals = _change_decimals(delta)
    return f"[{100 * delta.low:+.{decimals}f}, {100 * delta.high:+.{decimals}f}]"


def noise_text(delta: Delta | None) -> str:
    """The noise floor, such as `±0.02 %`: what the baseline against itself shows at most."""
    if delta is None or delta.noise_low is None or delta.noise_high is None:
        return ""
    noise = _percent(max(abs(delta.noise_low), abs(delta.noise_high)))
    return noise if noise.startswith("<") else f"±{noise}"


def detectable_text(delta: Delta | None) -> str:
    """The smallest change that could have been told from none, such as `0.05 %`."""
    return "" if delta is None or delta.detectable is None else _percent(delta.detectable)


def _scale(metric: str, measured: Measurement) -> tuple[float, str]:
    """The factor from the metric's own unit to the one that is printed, and the name of that."""
    if measured.unit == "bytes":
        size, unit = next(pair for pair in BYTE_UNITS if abs(measured.value) >= pair[0] or pair[0] == 1.0)
        return 1.0 / size, unit
    if metric in SHARES:
        return 100.0, "%"
    return 1.0, "" if measured.unit in SILENT_UNITS else measured.unit


def _percent(share: float) -> str:
    """Two digits are enough to know a noise by, and a hundredth of a percent is close enough to none."""
    percent = 100 * share
    if 0 < percent < 0.005:
        return "<0.01 %"
    return f"{percent:.{min(_decimals(percent, digits=2), 2)}f} %"


def _format(number: float) -> str:
    """How to print a number, and its interval with it."""
    return ".1e" if 0 < abs(number) < SMALLEST else f".{_decimals(number)}f"


def _decimals(number: float, digits: int = DIGITS) -> int:
    """Decimals that leave `digits` digits."""
    return max(digits - 1 - math.floor(math.log10(abs(number))), 0) if number else 0


def _change_decimals(delta: Delta) -> int:
    """Decimals for a change and its interval alike: the largest of them has three digits."""
    ends = [end for end in (delta.relative, delta.low, delta.high) if end is not None]
    return min(max(_decimals(100 * max(map(abs, ends)), digits=3), 1), 3)
