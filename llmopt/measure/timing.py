"""From the calls of all rounds to latency, throughput and memory, each with its interval and its change."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmopt.measure.block import Block
from llmopt.measure.outcome import Side
from llmopt.measure.stats import (
    Array,
    max_percentile,
    median_interval,
    paired_ratio,
    paired_ratio_interval,
    pooled_median,
)
from llmopt.report.results import METRICS, Delta, Measurement

TAILS = (0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """Every call of one variant, [rounds, calls]. `peak_rss_bytes` has one value a process, or is None."""

    ttft_ms: Array
    tpot_ms: Array
    peak_rss_bytes: Array | None
    warmup_calls: int
    settled: bool

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> "Calls":
        """One block a round."""
        peaks = [block.peak_rss_bytes for block in blocks]
        known = [float(peak) for peak in peaks if peak is not None]
        return cls(
            ttft_ms=np.array([block.ttft_ms for block in blocks]),
            tpot_ms=np.array([block.tpot_ms for block in blocks]),
            peak_rss_bytes=np.array(known)[:, None] if len(known) == len(peaks) else None,
            warmup_calls=sum(block.warmup_calls for block in blocks),
            settled=all(block.settled for block in blocks),
        )

    def with_calls(self, other: "Calls") -> "Calls":
        """The calls of two blocks of the same variant in each round."""
        peaks = [peak for peak in (self.peak_rss_bytes, other.peak_rss_bytes) if peak is not None]
        return Calls(
            ttft_ms=np.hstack([self.ttft_ms, other.ttft_ms]),
            tpot_ms=np.hstack([self.tpot_ms, other.tpot_ms]),
            peak_rss_bytes=np.hstack(peaks) if len(peaks) == 2 else None,
            warmup_calls=self.warmup_calls + other.warmup_calls,
            settled=self.settled and other.settled,
        )

    def quantities(self, prompt_tokens: int) -> dict[str, Array]:
        """Every metric that follows from the calls, by its name in the report."""
        measured = {
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "prefill_tokens_per_s": 1e3 * prompt_tokens / self.ttft_ms,
            "decode_tokens_per_s": 1e3 / self.tpot_ms,
        }
        return measured if self.peak_rss_bytes is None else measured | {"peak_rss_bytes": self.peak_rss_bytes}


def baseline_side(calls: Calls, prompt_tokens: int, seed: int) -> Side:
    """What was measured of the baseline, both of its blocks in each round together."""
    return Side(metrics=_metrics(calls, prompt_tokens, seed), extra=_extra(calls))


def candidate_side(calls: Calls, baseline: Calls, noise: dict[str, Delta], prompt_tokens: int, seed: int) -> Side:
    """What was measured of a candidate, and how it compares with the baseline in the same rounds."""
    deltas = {
        name: _with_noise(delta, noise.get(name))
        for name, delta in changes(calls, baseline, prompt_tokens, seed).items()
    }
    return Side(metrics=_metrics(calls, prompt_tokens, seed), deltas=deltas, extra=_extra(calls))


def _with_noise(delta: Delta, floor: Delta | None) -> Delta:
    """A change beside what the baseline shows against itself, and no surer than that.

    A few rounds that happen to agree make a narrow interval; what no change at all showed in the same rounds says how
    far it can be trusted, so the interval reaches as far from the change.
    """
    if delta.low is None or delta.high is None or floor is None or floor.low is None or floor.high is None:
        return delta
    noise_low, noise_high = min(0.0, floor.low), max(0.0, floor.high)
    return Delta(
        relative=delta.relative,
        low=min(delta.low, delta.relative + noise_low),
        high=max(delta.high, delta.relative + noise_high),
        noise_low=noise_low,
        noise_high=noise_high,
    )


def changes(calls: Calls, baseline: Calls, prompt_tokens: int, seed: int) -> dict[str, Delta]:
    """Relative change of every metric that both sides have, paired within rounds."""
    below = baseline.quantities(prompt_tokens)
    found = {}
    for name, above_BN in calls.quantities(prompt_tokens).items():
        if name not in below:
            continue
        low, high = paired_ratio_interval(above_BN, below[name], seed) or (None, None)
        found[name] = Delta(
            relative=paired_ratio(above_BN, below[name]) - 1.0,
            low=None if low is None else low - 1.0,
            high=None if high is None else high - 1.0,
        )
    return found


def _metrics(calls: Calls, prompt_tokens: int, seed: int) -> dict[str, Measurement]:
    metrics = {}
    for name, calls_BN in calls.quantities(prompt_tokens).items():
        low, high = median_interval(calls_BN, seed) or (None, None)
        value = pooled_median(calls_BN)
        metrics[name] = Measurement(value=value, low=low, high=high, n=calls_BN.size, unit=METRICS[name][0])
    return metrics


def _extra(calls: Calls) -> dict[str, Measurement | None]:
    """Tails that the sample supports, the slowest call always, and how many calls were dropped to warm up."""
    rounds = len(calls.ttft_ms)
    extra: dict[str, Measurement | None] = {
        "warmup_calls": Measurement(value=float(calls.warmup_calls), n=rounds, unit="calls")
    }
    for name, calls_BN in (("ttft_ms", calls.ttft_ms), ("tpot_ms", calls.tpot_ms)):
        n = calls_BN.size
        extra[f"{name}_max"] = Measurement(value=float(calls_BN.max()), n=n, unit="ms")
        for tail in TAILS:
            value = float(np.quantile(calls_BN, tail))
            supported = max_percentile(n) >= tail
            extra[f"{name}_p{tail * 100:.0f}"] = Measurement(value=value, n=n, unit="ms") if supported else None
    return extra
