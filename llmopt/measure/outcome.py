"""What one way of measuring found out about the baseline and each candidate."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmopt.report.results import Delta, Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What was found out about one model. The baseline has no deltas."""

    metrics: Mapping[str, Measurement]
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    extra: Mapping[str, Measurement | None] = field(default_factory=dict)

    def with_side(self, other: "Side") -> "Side":
        """Both together; they measured different things."""
        return Side(
            metrics={**self.metrics, **other.metrics},
            deltas={**self.deltas, **other.deltas},
            extra={**self.extra, **other.extra},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One comparison: candidates in the order in which they were given.

    `settings` says how it was measured, under the name of the way (`{"fidelity": {…}}`); `notes` are for a person.
    """

    baseline: Side
    candidates: tuple[Side, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def with_outcome(self, other: "Outcome") -> "Outcome":
        """Both together, such as accuracy and latency of the same candidates."""
        return Outcome(
            baseline=self.baseline.with_side(other.baseline),
            candidates=tuple(
                mine.with_side(theirs) for mine, theirs in zip(self.candidates, other.candidates, strict=True)
            ),
            settings={**self.settings, **other.settings},
            notes=self.notes + other.notes,
        )
