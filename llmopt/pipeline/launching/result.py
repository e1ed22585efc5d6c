"""What a launch found: tokens, and what was predicted beside what was measured."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from llmopt.partition.plan import Plan, Stage
from llmopt.pipeline.launching.job import Job
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
    """One stage: milliseconds that it computed for a micro-batch of a prefill and of a token, bytes it needed and sent.

    Of its ranks the slowest and the largest count. Memory is what a process took beyond what it had before any weight.
    Traffic is that of a whole prefill, and of one token of every sequence: what goes to other stages, from all ranks,
    and what each rank adds up with the others of its stage.
    """

    devices: tuple[str, ...]
    layers: tuple[int, int]
    prefill_ms: Compared
    decode_ms: Compared
    memory_bytes: Compared
    prefill_sent_bytes: int
    decode_sent_bytes: int
    prefill_added_bytes: int
    decode_added_bytes: int
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The launched run beside a single process: whether all tokens agree, the largest |Δlogit|, ‖Δ‖ / ‖logits‖."""

    tokens_equal: bool
    largest_difference: float
    relative_error: float


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


def stage_results(plan: Plan, job: Job, outcome: Outcome, *, as_planned: bool) -> tuple[StageResult, ...]:
    """Of every stage; predictions are left out where something else was run than what was planned."""
    return tuple(
        _stage_result(stage, job, [outcome.reports[rank] for rank in job.layout.ranks(number)], as_planned=as_planned)
        for number, stage in enumerate(plan.stages)
    )


def _stage_result(stage: Stage, job: Job, reports: Sequence[RankReport], *, as_planned: bool) -> StageResult:
    def compared(predicted: float, measured: Iterable[float | None]) -> Compared:
        return Compared(predicted=predicted if as_planned else None, measured=_largest(measured))

    prefills = [report.rounds[0].phases[0] for report in reports]
    decodes = [phase for report in reports for phase in report.rounds[0].phases[1:2]]
    return StageResult(
        devices=stage.devices,
        layers=stage.layers,
        prefill_ms=compared(
            stage.prefill_ms - stage.prefill_hop_ms, (_busy_ms(each, slice(0, 1), job.cut.count) for each in reports)
        ),
        decode_ms=compared(
            stage.decode_ms - stage.decode_hop_ms,
            (_busy_ms(each, slice(1, None), job.cut.sequences) for each in reports),
        ),
        memory_bytes=compared(stage.memory_bytes, map(_grown_bytes, reports)),
        prefill_sent_bytes=sum(phase.sent_bytes for phase in prefills),
        decode_sent_bytes=sum(phase.sent_bytes for phase in decodes),
        prefill_added_bytes=prefills[0].added_bytes,
        decode_added_bytes=decodes[0].added_bytes if decodes else 0,
        load_s=max(report.load_s for report in reports),
    )


def _busy_ms(report: RankReport, which: slice, micro_batches: int) -> float | None:
    phases = [phase for each in report.rounds for phase in each.phases[which]]
    return 1e3 * median(phase.busy_s for phase in phases) / micro_batches if phases else None


def _grown_bytes(report: RankReport) -> float | None:
    return None if report.peak_bytes is None else float(report.peak_bytes - report.start_bytes)


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _stage_json(stage: StageResult) -> dict[str, Any]:
    compared = {name: getattr(stage, name).to_json() for name in ("prefill_ms", "decode_ms", "memory_bytes")}
    return asdict(stage) | compared
