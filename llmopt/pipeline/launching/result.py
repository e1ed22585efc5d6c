"""What a launch found: tokens, and what was predicted beside what was measured."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from llmopt.partition.runtime.trace import Spent
from llmopt.pipeline.launching.planned import Planned
from llmopt.pipeline.launching.rank import Outcome, RankReport

SCHEMA = "llmopt.launch/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A number as predicted and as measured; None where it was not."""

    predicted: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """By what part of the measured number the predicted one is above it."""
        if self.predicted is None or not self.measured:
            return None
        return self.predicted / self.measured - 1

    def to_json(self) -> dict[str, float | None]:
        """With the error."""
        return {"predicted": self.predicted, "measured": self.measured, "error": self.error}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """One stage: milliseconds that it computed for a prefill and for a token, bytes that it needed and sent.

    Of its ranks the slowest and the largest count. Memory is what a process took beyond what it had before any weight.
    `sent_bytes` go to other stages, `added_bytes` are added up inside; per prefill, and per token of every sequence.
    """

    devices: tuple[str, ...]
    layers: tuple[int, int]
    prefill_ms: Compared
    decode_ms: Compared
    memory_bytes: Compared
    waiting_ms: float
    prefill_sent_bytes: int
    decode_sent_bytes: int
    decode_added_bytes: int
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The launched run held against a single process: whether all tokens agree, and the largest |Δlogit|."""

    tokens_equal: bool
    largest_difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchResult:
    """All of it. `tokens` are new ones of each sequence, `texts` what they say where there is a tokenizer."""

    model: str
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...] | None
    ttft_ms: Compared
    tpot_ms: Compared
    stages: tuple[StageResult, ...]
    rounds: int
    verified: Verified | None

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        compared = {"ttft_ms": self.ttft_ms.to_json(), "tpot_ms": self.tpot_ms.to_json()}
        return {"schema": SCHEMA} | asdict(self) | compared | {"stages": [_stage_json(stage) for stage in self.stages]}


def latencies_ms(reports: Sequence[RankReport]) -> tuple[float, float | None]:
    """TTFT and TPOT of the first rank, the medians of its rounds; no TPOT of a single token."""
    ended = [each.ended_s for each in reports[0].rounds]
    ttft_ms = 1e3 * median(times[0] for times in ended)
    if len(ended[0]) == 1:
        return ttft_ms, None
    return ttft_ms, 1e3 * median((times[-1] - times[0]) / (len(times) - 1) for times in ended)


def stage_results(plan: Planned, outcome: Outcome, *, as_planned: bool) -> tuple[StageResult, ...]:
    """Of every stage; predictions are left out where something else was run than what was planned."""
    found, layout = [], plan.layout
    for number, stage in enumerate(plan.stages):
        reports = [outcome.reports[rank] for rank in layout.ranks(number)]
        first = reports[0].rounds[0].phases
        decode = first[-1] if len(first) > 1 else Spent()
        found.append(
            StageResult(
                devices=stage.devices,
                layers=stage.layers,
                prefill_ms=Compared(
                    predicted=stage.prefill_ms if as_planned else None,
                    measured=max(_busy_ms(report, prefill=True) or 0.0 for report in reports),
                ),
                decode_ms=Compared(
                    predicted=stage.decode_ms if as_planned else None,
                    measured=_largest(_busy_ms(report, prefill=False) for report in reports),
                ),
                memory_bytes=Compared(
                    predicted=stage.memory_bytes if as_planned else None,
                    measured=_largest(_grown_bytes(report) for report in reports),
                ),
                waiting_ms=1e3 * median(each.phases[-1].waiting_s for each in reports[0].rounds),
                prefill_sent_bytes=sum(report.rounds[0].phases[0].sent_bytes for report in reports),
                decode_sent_bytes=sum(report.rounds[0].phases[-1].sent_bytes for report in reports)
                if len(first) > 1
                else 0,
                decode_added_bytes=decode.added_bytes,
                load_s=max(report.load_s for report in reports),
            )
        )
    return tuple(found)


def _busy_ms(report: RankReport, *, prefill: bool) -> float | None:
    phases = [phase for each in report.rounds for phase in (each.phases[:1] if prefill else each.phases[1:])]
    return 1e3 * median(phase.busy_s for phase in phases) if phases else None


def _grown_bytes(report: RankReport) -> float | None:
    return None if report.peak_bytes is None else float(report.peak_bytes - report.start_bytes)


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _stage_json(stage: StageResult) -> dict[str, Any]:
    compared = {name: getattr(stage, name).to_json() for name in ("prefill_ms", "decode_ms", "memory_bytes")}
    return asdict(stage) | compared
