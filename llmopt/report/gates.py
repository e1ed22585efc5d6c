"""Promises about a report, `metric OP bound`, judged on the interval and turned into an exit code.

    perplexity <= +1%         the change against the baseline; the sign is what makes it a change
    tpot_ms <= 0.8x           the ratio to the baseline
    tpot_ms <= 20             the value, in the metric's own unit
    size_bytes <= 150MB       the value, with a unit
    top1_agreement >= 98%     the value; a share may be a percentage

A gate passes when the whole interval keeps the promise, fails when none of it does, and is inconclusive when it
straddles the bound or when there is nothing to judge. It holds for every candidate.
"""

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from llmopt.errors import ExitCode, UsageError, near_match
from llmopt.report.results import METRICS, Candidate, Delta, GateResult, Measurement, Report, Verdict

Against = Literal["value", "change", "ratio"]

HINT = "write a metric, an operator and a bound: 'perplexity <= +1%', 'tpot_ms <= 0.8x', 'size_bytes <= 150MB'"
OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}
BYTES = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
UNITS: Mapping[str, Mapping[str, float]] = {
    "bytes": BYTES,
    "ms": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "tokens/s": {"tokens/s": 1.0},
    "nats": {"nats": 1.0},
    "1": {},
}
SHARES = frozenset({"top1_agreement"})
# Distances from the baseline: the baseline's own is 0 (or 1), so that a change against it says nothing.
DISTANCES = frozenset({"kl_divergence", "top1_agreement"})
EXACT = frozenset({"size_bytes"})  # counted, not sampled: these need no interval

_GATE = re.compile(
    r"\s*(?P<metric>\w+)\s*(?P<operator><=|>=|<|>)"
    r"\s*(?P<sign>[+-]?)(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\s*(?P<unit>[A-Za-z/%]*)\s*"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A promise that was understood. `against` says what `bound` is: a value, in the metric's unit, or relative."""

    expr: str
    metric: str
    operator: str
    against: Against
    bound: float


def parse_gate(text: str) -> Gate:
    """Read a promise.

    Raises:
        UsageError: it cannot be read, or names a metric, unit or comparison that does not exist.
    """
    match = _GATE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a gate", hint=HINT)
    metric = match["metric"]
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}", where=text, hint=near_match(metric, METRICS))
    against, bound = _bound(metric, match, text)
    if against != "value" and metric in DISTANCES:
        raise UsageError(
            f"{metric} is itself a comparison with the baseline, so it has no change",
            where=text,
            hint="give a plain bound: 'kl_divergence <= 0.05', 'top1_agreement >= 0.98'",
        )
    return Gate(expr=text.strip(), metric=metric, operator=match["operator"], against=against, bound=bound)


def judge(gate: Gate, report: Report) -> tuple[GateResult, ...]:
    """Judge a promise, once for each candidate."""
    return tuple(_judge(gate, candidate) for candidate in report.candidates)


def exit_code(results: Iterable[GateResult]) -> ExitCode:
    """What the process says: 1 if any gate failed, else 4 if any is inconclusive, else 0."""
    verdicts = {result.verdict for result in results}
    if "fail" in verdicts:
        return ExitCode.GATE_FAILED
    return ExitCode.INCONCLUSIVE if "inconclusive" in verdicts else ExitCode.DONE


def _bound(metric: str, match: re.Match[str], text: str) -> tuple[Against, float]:
    """What the bound is compared with, and the bound as a plain number."""
    number, unit = float(match["sign"] + match["number"]), match["unit"]
    if unit == "x" and not match["sign"]:
        return "ratio", number
    if unit == "%" and match["sign"]:
        return "change", number / 100
    if match["sign"]:
        raise UsageError(
            "a sign stands before a percentage, the change against the baseline", where=text, hint=f"{metric} <= +1%"
        )
    if unit == "%" and metric in SHARES:
        return "value", number / 100
    if not unit and metric in SHARES and number > 1:
        hint = f"write {number:g}%" if number <= 100 else "a share lies between 0 and 1, or 0% and 100%"
        raise UsageError(f"{metric} is a share, which is at most 1", where=text, hint=hint)
    if unit == "%":
        raise UsageError(
            "a percentage without a sign",
            where=text,
            hint=f"a change against the baseline has one: +{match['number']}%",
        )
    units = UNITS[METRICS[metric][0]]
    if unit and unit not in units:
        known = ", ".join(units) or "a plain number"
        raise UsageError(f"{unit!r} is no unit of {metric}", where=text, hint=f"use {known}")
    return "value", number * units.get(unit, 1.0)


def _judge(gate: Gate, candidate: Candidate) -> GateResult:
    if gate.against == "value":
        value, low, high = _of_value(candidate.metrics.get(gate.metric))
    else:
        value, low, high = _of_change(candidate.deltas.get(gate.metric), 1.0 if gate.against == "ratio" else 0.0)
    return GateResult(
        expr=gate.expr,
        verdict=_verdict(gate, value, low, high),
        value=value,
        low=low,
        high=high,
        candidate=candidate.name,
    )


def _of_value(measured: Measurement | None) -> tuple[float | None, float | None, float | None]:
    return (measured.value, measured.low, measured.high) if measured else (None, None, None)


def _of_change(delta: Delta | None, one: float) -> tuple[float | None, float | None, float | None]:
    """The change, or with `one` the ratio."""
    if delta is None:
        return None, None, None
    low, high = (None if end is None else one + end for end in (delta.low, delta.high))
    return one + delta.relative, low, high


def _verdict(gate: Gate, value: float | None, low: float | None, high: float | None) -> Verdict:
    if value is not None and gate.metric in EXACT:
        low = high = value
    if value is None or low is None or high is None:
        return "inconclusive"
    keeps = [OPERATORS[gate.operator](end, gate.bound) for end in (low, high)]
    if all(keeps):
        return "pass"
    return "inconclusive" if any(keeps) else "fail"
