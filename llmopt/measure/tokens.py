"""Two models' logits on the same tokens: how likely each found them, and how far the distributions lie apart."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmopt.engine.base import Logits, TokenIds

CHUNK_ELEMENTS = 2**22  # temporaries of 16 MB each, whatever the vocabulary


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One value a token, shape [T]; logarithms are natural.

    `baseline_nll` and `candidate_nll` are -log p(token), `kl` is KL(baseline || candidate) over the full vocabulary,
    `agree` is whether both have the same most likely token.
    """

    baseline_nll: NDArray[np.float64]
    candidate_nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    agree: NDArray[np.bool_]


def score(baseline_TV: Logits, candidate_TV: Logits, targets_T: TokenIds) -> TokenScores:
    """Hold two models' logits at the same positions against the tokens that follow them."""
    rows = max(1, CHUNK_ELEMENTS // baseline_TV.shape[1])
    parts = [
        _score(baseline_TV[start : start + rows], candidate_TV[start : start + rows], targets_T[start : start + rows])
        for start in range(0, len(targets_T), rows)
    ]
    return TokenScores(
        np.concatenate([part.baseline_nll for part in parts]),
        np.concatenate([part.candidate_nll for part in parts]),
        np.concatenate([part.kl for part in parts]),
        np.concatenate([part.agree for part in parts]),
    )


def _score(baseline_TV: Logits, candidate_TV: Logits, targets_T: TokenIds) -> TokenScores:
    weights_TV, total_T, baseline_lse_T = _exponentials(baseline_TV)
    _, _, candidate_lse_T = _exponentials(candidate_TV)
    # KL = Σ p (a - b) - lse(a) + lse(b). The difference of two close logits is exact in float32, so nothing cancels
    # that has not been summed in float64 already, and a model against itself gives exactly 0.
    weights_TV *= baseline_TV - candidate_TV
    mean_difference_T = weights_TV.sum(axis=1, dtype=np.float64) / total_T
    row_T = np.arange(len(targets_T))
    return TokenScores(
        baseline_nll=baseline_lse_T - baseline_TV[row_T, targets_T],
        candidate_nll=candidate_lse_T - candidate_TV[row_T, targets_T],
        kl=mean_difference_T - baseline_lse_T + candidate_lse_T,
        agree=baseline_TV.argmax(axis=1) == candidate_TV.argmax(axis=1),
    )


def _exponentials(logits_TV: Logits) -> tuple[Logits, NDArray[np.float64], NDArray[np.float64]]:
    """exp(logits - their maximum), its sum over the vocabulary, and the log of the sum of exp(logits)."""
    largest_T1 = logits_TV.max(axis=1, keepdims=True)
    weights_TV = np.exp(logits_TV - largest_T1)
    total_T = weights_TV.sum(axis=1, dtype=np.float64)
    return weights_TV, total_T, largest_T1[:, 0] + np.log(total_T)
