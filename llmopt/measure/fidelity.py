"""What a candidate's numbers cost in accuracy: perplexity, KL divergence and top-1 agreement, on the same tokens.

Every model reads the same windows of text, teacher-forced, window by window: logits of one window are all that is ever
held. The unit of the bootstrap is the document, because the tokens of one are not independent.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmopt.engine.base import Engine, Logits, TokenIds
from llmopt.errors import LlmoptError, UsageError
from llmopt.measure.accuracy import AccuracySums, baseline_side, candidate_side, noise_bounds
from llmopt.measure.outcome import Outcome
from llmopt.measure.tokens import score
from llmopt.progress import Progress, Task

FEW_CLUSTERS = 10  # Student's t with fewer is wider than the normal distribution by more than a sixth
NOISE_PAIRS = 2
NOISE_ELEMENTS = 2**26  # logits of one pair of windows: at most 256 MB


class TokenWindows(Protocol):
    """Held-out text as windows of tokens; the first token of each is context only.

    `ids` and `cluster` hold one array [T] for each window. A cluster is what `clustered_by` says: a document.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def sha256(self) -> str: ...  # noqa: D102
    @property
    def clustered_by(self) -> str: ...  # noqa: D102
    @property
    def ids(self) -> tuple[TokenIds, ...]: ...  # noqa: D102
    @property
    def cluster(self) -> tuple[NDArray[np.int64], ...]: ...  # noqa: D102


def compare(
    baseline: Engine, candidates: Sequence[Engine], windows: TokenWindows, seed: int, progress: Progress
) -> Outcome:
    """Hold candidates (at least one) against the baseline.

    The baseline is also held against itself, with windows two by two in a batch against each alone: its sums are then
    arranged in another way, and what that changes is the noise below which a delta means nothing. The baseline's
    own `kl_divergence` and `top1_agreement` are those of that comparison.

    Raises:
        UsageError: there is nothing to predict, or a candidate has another vocabulary than the baseline.
        LlmoptError: an engine gives logits that are not finite.
    """
    assert candidates, "accuracy is measured against something"
    for candidate in candidates:
        _check_vocabulary(baseline, candidate)
    clusters, inputs = _clustered(windows)
    sums = [AccuracySums(clusters) for _ in candidates]
    with progress.task("accuracy", total=len(inputs) * (1 + len(candidates))) as task:
        for ids_T, cluster_T in inputs:
            baseline_TV = _predictions(baseline, ids_T[None], task)[0]
            for engine, engine_sums in zip(candidates, sums, strict=True):
                engine_sums.add(score(baseline_TV, _predictions(engine, ids_T[None], task)[0], ids_T[1:]), cluster_T)
    with progress.task("accuracy of the baseline against itself") as task:
        itself = _against_itself(baseline, [ids_T for ids_T, _ in inputs], seed, task)
    noise = noise_bounds(itself)
    return Outcome(
        baseline=baseline_side(sums[0], itself, seed),
        candidates=tuple(candidate_side(engine_sums, noise, seed) for engine_sums in sums),
        settings={"fidelity": _settings(windows, sums[0].tokens, clusters)},
        notes=_notes(windows, clusters),
    )


def _clustered(windows: TokenWindows) -> tuple[int, list[tuple[TokenIds, NDArray[np.int64]]]]:
    """How many clusters there are, and each window with the clusters, counted from 0, of the tokens it predicts."""
    usable = [(ids_T, cluster_T[1:]) for ids_T, cluster_T in zip(windows.ids, windows.cluster, strict=True)]
    usable = [(ids_T, cluster_T) for ids_T, cluster_T in usable if len(cluster_T)]
    if not usable:
        raise UsageError("the text is too short: no window has two tokens", where=windows.name)
    names = np.unique(np.concatenate([cluster_T for _, cluster_T in usable]))
    return len(names), [(ids_T, np.searchsorted(names, cluster_T)) for ids_T, cluster_T in usable]


def _against_itself(baseline: Engine, windows: Sequence[TokenIds], seed: int, task: Task) -> AccuracySums:
    """The baseline on a few pairs of windows in one batch, against each of them alone; one cluster a window."""
    sums = AccuracySums(2 * NOISE_PAIRS)
    for pair, (first_T, second_T) in enumerate(_pairs(windows, seed)):
        tokens = max(2, min(len(first_T), len(second_T), NOISE_ELEMENTS // (2 * baseline.vocab_size)))
        ids_BT = np.stack([first_T[:tokens], second_T[:tokens]])
        together_BTV = _predictions(baseline, ids_BT, task)
        for row, ids_T in enumerate(ids_BT):
            alone_TV = _predictions(baseline, ids_T[None], task)[0]
            cluster_T = np.full(tokens - 1, 2 * pair + row)
            sums.add(score(alone_TV, together_BTV[row], ids_T[1:]), cluster_T)
    return sums


def _pairs(windows: Sequence[TokenIds], seed: int) -> Iterator[tuple[TokenIds, TokenIds]]:
    """Two different windows at a time, as long as there are two."""
    rng = np.random.default_rng(seed)
    for _ in range(NOISE_PAIRS):
        first, second = rng.choice(len(windows), 2, replace=len(windows) < 2)
        yield windows[first], windows[second]


def _predictions(engine: Engine, ids_BT: TokenIds, task: Task) -> Logits:
    """Logits for the tokens behind the first one, [batch, tokens - 1, vocab_size]."""
    logits_BTV = engine.logits(ids_BT)[:, :-1]
    # A sum is not finite if one of its terms is not: cheaper than a mask as large as the logits.
    if not np.isfinite(logits_BTV.sum(dtype=np.float64)):
        raise LlmoptError(
            "the logits hold NaN or Inf", where=engine.name, hint="check the checkpoint with `llmopt inspect`"
        )
    task.advance()
    return logits_BTV


def _check_vocabulary(baseline: Engine, candidate: Engine) -> None:
    if candidate.vocab_size != baseline.vocab_size:
        raise UsageError(
            f"the candidate has {candidate.vocab_size} logits a token and the baseline {baseline.vocab_size}",
            where=candidate.name,
            hint="compare models that share a tokenizer",
        )


def _settings(windows: TokenWindows, tokens: int, clusters: int) -> dict[str, object]:
    return {
        "text": windows.name,
        "sha256": windows.sha256,
        "windows": len(windows.ids),
        "tokens": tokens,
        "clusters": clusters,
        "clustered_by": windows.clustered_by,
    }


def _notes(windows: TokenWindows, clusters: int) -> tuple[str, ...]:
    unit = windows.clustered_by
    if clusters == 1:
        return (
            f"accuracy has no interval: all tokens of {windows.name} belong to one {unit}; measure on more of them",
        )
    if clusters >= FEW_CLUSTERS:
        return ()
    more = "read more tokens, or a text of more documents" if unit == "document" else "read more tokens"
    return (f"the tokens come from {clusters} {unit}s only, which makes the intervals of accuracy wide: {more}",)
