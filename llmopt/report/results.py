"""What was measured, as typed values, and how it looks as JSON.

`report` knows result types only: it never opens a model. The JSON is a contract; it changes only by additions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = "llmopt.report/1"

# Every metric that a report can hold: its unit, and which way is better (-1: lower, +1: higher).
METRICS: Mapping[str, tuple[str, int]] = {
    "size_bytes": ("bytes", -1),
    "perplexity": ("1", -1),
    "kl_divergence": ("nats", -1),
    "top1_agreement": ("1", +1),
    "ttft_ms": ("ms", -1),
    "tpot_ms": ("ms", -1),
    "prefill_tokens_per_s": ("tokens/s", +1),
    "decode_tokens_per_s": ("tokens/s", +1),
    "peak_rss_bytes": ("bytes", -1),
}
# These depend on the machine and the moment: two runs of one recipe agree on everything else, byte for byte.
TIMING_METRICS = frozenset({"ttft_ms", "tpot_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A number with its 95 % interval, its count and its unit. `low` and `high` are None for what has no spread."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int
    unit: str

    def to_json(self) -> dict[str, Any]:
        """The form that a report holds."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n, "unit": self.unit}


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """Candidate / baseline - 1 with its 95 % interval, paired.

    `noise_low` and `noise_high` bound what the baseline measured against itself shows: a change inside them could not
    have been seen. They are None where the comparison has no noise of its own (sizes), or where it was not measured.
    """

    relative: float
    low: float | None = None
    high: float | None = None
    noise_low: float | None = None
    noise_high: float | None = None

    @property
    def detectable(self) -> float | None:
        """The smallest change that this comparison could have told from none; None where it has no interval.

        A change is seen when its interval excludes 0 and lies outside the noise, so it is the larger half of either.
        """
        if self.low is None or self.high is None:
            return None
        noise = max(abs(self.noise_low or 0.0), abs(self.noise_high or 0.0))
        return max(self.relative - self.low, self.high - self.relative, noise)

    def to_json(self) -> dict[str, Any]:
        """The form that a report holds."""
        return {
            "relative": self.relative,
            "low": self.low,
            "high": self.high,
            "noise_low": self.noise_low,
            "noise_high": self.noise_high,
            "detectable": self.detectable,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """What one linear or embedding got. `reason` says why it was left alone, or why it differs from what was asked."""

    name: str
    scheme: str | None
    method: str | None
    reason: str | None = None
    relative_error: float | None = None  # ‖W - Ŵ‖ / ‖W‖, Frobenius
    # By method, where several were tried: ‖(W - Ŵ) x‖ / ‖W x‖ of tokens that were not fitted to.
    held_out_errors: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The form that a report holds."""
        return {
            "name": self.name,
            "scheme": self.scheme,
            "method": self.method,
            "reason": self.reason,
            "relative_error": self.relative_error,
            "held_out_errors": self.held_out_errors,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One side of a comparison: what it is and what was measured of it. A metric that is None was not measured.

    `extra` holds what stands beside the metrics: tails, counts of warm-up calls. No gate can name it.
    """

    name: str
    engine: str
    metrics: Mapping[str, Measurement | None]
    path: str | None = None
    extra: Mapping[str, Measurement | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The form that a report holds: every metric is there, measured or null."""
        measured = {name: value.to_json() for name, value in self.metrics.items() if value is not None}
        metrics = {name: measured.get(name) for name in METRICS}
        extra = {name: value.to_json() if value else None for name, value in sorted(self.extra.items())}
        return {"name": self.name, "path": self.path, "engine": self.engine, "metrics": metrics, "extra": extra}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(Subject):
    """An artifact held against the baseline."""

    scheme: str | None = None
    method: str | None = None
    deltas: Mapping[str, Delta | None] = field(default_factory=dict)
    layers: tuple[LayerResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The form that a report holds."""
        known = {name: delta.to_json() for name, delta in self.deltas.items() if delta is not None}
        # Explicit base: slots=True makes a new class, and zero-argument super() still points at the old one.
        return Subject.to_json(self) | {
            "scheme": self.scheme,
            "method": self.method,
            "deltas": {name: known.get(name) for name in METRICS},
            "layers": [layer.to_json() for layer in self.layers],
        }


Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """A promise and what became of it. `value`, `low` and `high` are what was compared with the bound."""

    expr: str
    verdict: Verdict
    value: float | None
    low: float | None
    high: float | None
    candidate: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The form that a report holds."""
        return {
            "expr": self.expr,
            "verdict": self.verdict,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "candidate": self.candidate,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole comparison. `notes` are sentences for a person: warnings of noise, what was not measured and why."""

    host: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int
    baseline: Subject | None
    candidates: tuple[Candidate, ...]
    gates: tuple[GateResult, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that `report.json` holds and that `--json` prints."""
        return {
            "schema": SCHEMA,
            "host": dict(self.host),
            "versions": dict(self.versions),
            "seed": self.seed,
            "settings": dict(self.settings),
            "baseline": self.baseline.to_json() if self.baseline else None,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "gates": [gate.to_json() for gate in self.gates],
            "notes": list(self.notes),
        }
