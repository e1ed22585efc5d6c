"""Promises about what is predicted, such as `ttft_ms<=300`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llmopt.errors import UsageError, near_match
from llmopt.partition.machine import Machine, Metric
from llmopt.partition.plan import Predicted

METRICS: Mapping[str, Metric] = {"ttft_ms": "ttft", "tpot_ms": "tpot", "throughput_tokens_per_s": "throughput"}

_SLO = re.compile(r"(?P<metric>\w+)\s*(?P<sign><=|>=)\s*(?P<bound>\d+(?:\.\d+)?)")
_ROUNDING = 1e-9  # a bound that was copied from what is printed in full is kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A bound on a prediction."""

    name: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.bound:g}"

    @property
    def metric(self) -> Metric:
        """As the search calls it."""
        return METRICS[self.name]

    @property
    def sign(self) -> str:
        """More tokens a second are better, and less of all else."""
        return ">=" if self.metric == "throughput" else "<="

    def kept(self, predicted: Predicted) -> bool:
        """Whether a plan keeps it."""
        value: float = getattr(predicted, self.name)
        if self.metric == "throughput":
            return value >= self.bound * (1 - _ROUNDING)
        return value <= self.bound * (1 + _ROUNDING)

    def most_s(self, machine: Machine) -> float:
        """The seconds, as the search counts them, that the stages of a machine must not be worth more than."""
        return self.bound / machine.unit(self.metric) if self.metric != "throughput" else self._cycle_s(machine)

    def _cycle_s(self, machine: Machine) -> float:
        return 1000 / (machine.unit("throughput") * self.bound) if self.bound else float("inf")


def parse_promise(text: str) -> Promise:
    """Read a promise.

    Raises:
        UsageError: it is none.
    """
    match = _SLO.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no promise", where="--slo", hint="write 'ttft_ms<=300'")
    if match["metric"] not in METRICS:
        raise UsageError(f"there is no {match['metric']!r}", where="--slo", hint=near_match(match["metric"], METRICS))
    promise = Promise(name=match["metric"], bound=float(match["bound"]))
    if match["sign"] != promise.sign:
        raise UsageError(f"{text!r} promises the wrong way round", where="--slo", hint=f"write '{promise}'")
    return promise


def bounds_of(promises: tuple[Promise, ...], machine: Machine) -> dict[Metric, float]:
    """All of them in seconds; of two about one metric, the stricter."""
    found: dict[Metric, float] = {}
    for promise in promises:
        most_s = promise.most_s(machine) * (1 + _ROUNDING)
        found[promise.metric] = min(most_s, found.get(promise.metric, most_s))
    return found
