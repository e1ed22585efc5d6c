"""Scores of tokens, summed by cluster, become perplexity, KL divergence, top-1 agreement and the change they show.

Intervals are found for means over tokens, and those of perplexities are exp of them: a perplexity is above 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmopt.measure.outcome import Side
from llmopt.measure.stats import Array, Interval, cluster_intervals, max_percentile
from llmopt.measure.tokens import TokenScores
from llmopt.report.results import METRICS, Delta, Measurement

TOKENS, BASELINE_NLL, CANDIDATE_NLL, KL, AGREE = range(5)
TAIL = 0.99


class Bounds(NamedTuple):
    """How far apart two measurements of the same thing lay, relatively; 0 is always inside."""

    low: float
    high: float


class AccuracySums:
    """What the bootstrap needs of a comparison: a row of sums for each cluster. Nothing grows with the vocabulary."""

    def __init__(self, clusters: int) -> None:
        self.sums_CQ: Array = np.zeros((clusters, 5))
        self._kl: list[NDArray[np.float32]] = []  # of every token, for the tail

    def add(self, scores: TokenScores, cluster_T: NDArray[np.int64]) -> None:
        """Count tokens in, each for its cluster."""
        columns = (np.ones(len(cluster_T)), scores.baseline_nll, scores.candidate_nll, scores.kl, scores.agree)
        for column, values_T in enumerate(columns):
            self.sums_CQ[:, column] += np.bincount(cluster_T, values_T, minlength=len(self.sums_CQ))
        self._kl.append(scores.kl.astype(np.float32))

    @property
    def totals(self) -> Array:
        """All clusters together."""
        return np.asarray(self.sums_CQ.sum(axis=0))

    @property
    def tokens(self) -> int:
        """Tokens that were predicted."""
        return int(self.totals[TOKENS])

    def kl_tail(self) -> dict[str, Measurement | None]:
        """The worst tokens: the largest KL divergence, and the 99th percentile where there are tokens enough."""
        kl_T = np.concatenate(self._kl)
        supported = max_percentile(len(kl_T)) >= TAIL
        return {
            "kl_divergence_p99": self._measured(np.quantile(kl_T, TAIL), "nats") if supported else None,
            "kl_divergence_max": self._measured(kl_T.max(), "nats"),
        }

    def _measured(self, value: np.floating, unit: str) -> Measurement:
        return Measurement(value=float(value), n=self.tokens, unit=unit)


def baseline_nll(totals: Array) -> Array:
    """The baseline's mean negative log-likelihood, the logarithm of its perplexity, from totals [..., Q]."""
    return totals[..., BASELINE_NLL] / totals[..., TOKENS]


def candidate_nll(totals: Array) -> Array:
    """The candidate's mean negative log-likelihood, the logarithm of its perplexity, from totals [..., Q]."""
    return totals[..., CANDIDATE_NLL] / totals[..., TOKENS]


def nll_change(totals: Array) -> Array:
    """Logarithm of candidate's perplexity / baseline's, from the tokens' own differences: what they share cancels."""
    return (totals[..., CANDIDATE_NLL] - totals[..., BASELINE_NLL]) / totals[..., TOKENS]


def mean_kl(totals: Array) -> Array:
    """Nats a token."""
    return totals[..., KL] / totals[..., TOKENS]


def agreement(totals: Array) -> Array:
    """Share of tokens whose most likely continuation is the same."""
    return totals[..., AGREE] / totals[..., TOKENS]


def candidate_side(sums: AccuracySums, noise: Bounds, seed: int) -> Side:
    """What was found out about a candidate."""
    nll, difference = cluster_intervals(sums.sums_CQ, [candidate_nll, nll_change], seed)
    change = _mapped(difference, np.expm1)
    delta = Delta(
        relative=float(np.expm1(nll_change(sums.totals))),
        low=change.low if change else None,
        high=change.high if change else None,
        noise_low=noise.low,
        noise_high=noise.high,
    )
    measured = _measurement("perplexity", np.exp(candidate_nll(sums.totals)), _mapped(nll, np.exp), sums.tokens)
    return Side(
        metrics={"perplexity": measured, **_closeness(sums, seed)},
        deltas={"perplexity": delta},
        extra=sums.kl_tail(),
    )


def baseline_side(sums: AccuracySums, itself: AccuracySums, seed: int) -> Side:
    """What was found out about the baseline: its perplexity, and how close it came to itself."""
    (nll,) = cluster_intervals(sums.sums_CQ, [baseline_nll], seed)
    measured = _measurement("perplexity", np.exp(baseline_nll(sums.totals)), _mapped(nll, np.exp), sums.tokens)
    return Side(metrics={"perplexity": measured, **_closeness(itself, seed)}, extra=itself.kl_tail())


def noise_bounds(itself: AccuracySums) -> Bounds:
    """The range of the change of perplexity over the clusters of a comparison of the baseline with itself."""
    changes_C = np.expm1(nll_change(itself.sums_CQ))
    return Bounds(min(0.0, float(changes_C.min())), max(0.0, float(changes_C.max())))


def _closeness(sums: AccuracySums, seed: int) -> dict[str, Measurement]:
    """KL divergence and top-1 agreement."""
    kl, agree = cluster_intervals(sums.sums_CQ, [mean_kl, agreement], seed)
    # Student's interval knows nothing of what these can be at all.
    kl = _mapped(kl, lambda end: max(end, 0.0))
    agree = _mapped(agree, lambda end: min(max(end, 0.0), 1.0))
    if agree is not None and sums.totals[AGREE] == sums.tokens:
        # No resample can hold a disagreement when there was none, yet n tokens without one do not exclude a share
        # of 1 - 0.05^(1/n), about 3/n.
        agree = Interval(0.05 ** (1.0 / sums.tokens), 1.0)
    return {
        "kl_divergence": _measurement("kl_divergence", mean_kl(sums.totals), kl, sums.tokens),
        "top1_agreement": _measurement("top1_agreement", agreement(sums.totals), agree, sums.tokens),
    }


def _mapped(interval: Interval | None, monotone: Callable[[float], float]) -> Interval | None:
    return None if interval is None else Interval(*(float(monotone(end)) for end in interval))


def _measurement(metric: str, value: Array, interval: Interval | None, tokens: int) -> Measurement:
    low, high = interval or (None, None)
    return Measurement(value=float(value), low=low, high=high, n=tokens, unit=METRICS[metric][0])
