"""Signs that a latency measurement was disturbed: what was seen, the likely cause, and what to do about it."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from llmopt.measure.stats import Array
from llmopt.measure.timing import Calls
from llmopt.report.results import Delta

BUSY = 0.5  # load average, as a share of the cores
DRIFT = 0.03  # between the first round and the last
SPREAD = 0.10  # coefficient of variation


def load_cautions(load: float | None, cores: int) -> Iterator[str]:
    """Whether the machine was busy before anything was measured."""
    if load is not None and load > BUSY * cores:
        yield (
            f"the load average was {load:g} on {cores} cores before measuring began: other programs compete for the "
            "processor; close them and measure again"
        )


def calls_cautions(calls: Sequence[tuple[str, Calls]]) -> Iterator[str]:
    """Whether any of the named variants had not become steady, drifted or scattered."""
    restless = [name for name, each in calls if not each.settled]
    if restless:
        yield (
            f"{', '.join(restless)}: calls were still changing when warming up ended at its limit; the processor's "
            "clock may be climbing or throttled; let the machine rest and measure again"
        )
    for metric in ("ttft_ms", "tpot_ms"):
        of_metric = [(name, getattr(each, metric)) for name, each in calls]
        yield from _drift(metric, of_metric)
        yield from _spread(metric, of_metric)


def noise_cautions(noise: Mapping[str, Delta]) -> Iterator[str]:
    """Whether the baseline differs from itself by more than its interval allows."""
    for metric, delta in noise.items():
        if delta.low is None or delta.high is None or delta.low <= 0.0 <= delta.high:
            continue
        yield (
            f"{metric}: the baseline measured against itself differs by {delta.relative:+.1%}; this machine is too "
            "unsteady for smaller changes; measure more rounds, or when nothing else runs"
        )


def _drift(metric: str, calls: Sequence[tuple[str, Array]]) -> Iterator[str]:
    changes = [(name, float(np.median(calls_BN[-1]) / np.median(calls_BN[0]) - 1.0)) for name, calls_BN in calls]
    drifting = [f"{name} {change:+.0%}" for name, change in changes if abs(change) > DRIFT]
    if drifting:
        yield (
            f"{metric} moved between the first round and the last ({', '.join(drifting)}): the processor's clock or "
            "temperature changed, or another program started; the pairing within rounds makes up for most of it"
        )


def _spread(metric: str, calls: Sequence[tuple[str, Array]]) -> Iterator[str]:
    spreads = [(name, float(calls_BN.std() / calls_BN.mean())) for name, calls_BN in calls]
    scattered = [f"{name} {spread:.0%}" for name, spread in spreads if spread > SPREAD]
    if scattered:
        yield (
            f"{metric} scattered widely (standard deviation over mean: {', '.join(scattered)}): something else ran now "
            "and then; medians are little affected, but more rounds or a quiet machine give narrower intervals"
        )
