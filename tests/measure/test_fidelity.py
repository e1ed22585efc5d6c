import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from llmopt.errors import LlmoptError, UsageError
from llmopt.measure import fidelity
from llmopt.measure.fidelity import compare
from llmopt.progress import Silent


class TableEngine:
    """Logits are a row of a table, chosen by the token; `batch_noise` is added when windows share a batch."""

    def __init__(self, table_VV, name="table 1", batch_noise=0.0):
        self.table_VV = np.asarray(table_VV, np.float32)
        self.name = name
        self.vocab_size = self.table_VV.shape[1]
        self.batch_noise = batch_noise

    def logits(self, ids_BT):
        logits = self.table_VV[ids_BT]
        if len(ids_BT) > 1:
            logits = logits + np.float32(self.batch_noise) * np.arange(self.vocab_size, dtype=np.float32)
        return logits


@dataclass(frozen=True)
class Windows:
    ids: tuple
    cluster: tuple
    name: str = "made up"
    sha256: str = "00"
    clustered_by: str = "document"


def random_table(seed, vocab=17, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, (vocab, vocab)).astype(np.float32)


def random_windows(seed=0, windows=12, tokens=40, documents=6, vocab=17):
    rng = np.random.default_rng(seed)
    ids = tuple(rng.integers(0, vocab, tokens) for _ in range(windows))
    cluster = tuple(np.full(tokens, 100 + 7 * (index % documents)) for index in range(windows))
    return Windows(ids=ids, cluster=cluster)


def nll(table_VV, windows):
    """-log p of every token behind the first of its window, in float64."""
    rows = []
    for ids in windows.ids:
        for before, token in itertools.pairwise(ids):
            logits = table_VV[before].astype(float)
            rows.append(np.log(np.exp(logits).sum()) - logits[token])
    return np.array(rows)


def test_an_engine_against_itself_has_no_delta():
    engine, windows = TableEngine(random_table(0)), random_windows()
    (side,) = compare(engine, [engine], windows, 0, Silent()).candidates
    delta = side.deltas["perplexity"]
    assert (delta.relative, delta.low, delta.high, delta.noise_low, delta.noise_high) == (0, 0, 0, 0, 0)
    assert side.metrics["kl_divergence"].value == 0
    assert side.metrics["top1_agreement"].value == 1


def test_perplexity_is_exp_of_the_mean_over_all_tokens_and_the_delta_is_their_ratio():
    tables, windows = [random_table(0), random_table(1)], random_windows()
    outcome = compare(TableEngine(tables[0]), [TableEngine(tables[1])], windows, 0, Silent())
    before, after = (np.exp(nll(table, windows).mean()) for table in tables)
    perplexity = outcome.candidates[0].metrics["perplexity"]
    assert outcome.baseline.metrics["perplexity"].value == pytest.approx(before, rel=1e-6)
    assert perplexity.value == pytest.approx(after, rel=1e-6)
    assert perplexity.low < perplexity.value < perplexity.high
    assert perplexity.n == 12 * 39
    assert outcome.candidates[0].deltas["perplexity"].relative == pytest.approx(after / before - 1, rel=1e-6)


def test_kl_divergence_is_the_mean_of_the_definition_in_the_right_direction():
    tables, windows = [random_table(0), random_table(1)], random_windows()
    (side,) = compare(TableEngine(tables[0]), [TableEngine(tables[1])], windows, 0, Silent()).candidates
    p, q = (np.exp(t.astype(float)) / np.exp(t.astype(float)).sum(1, keepdims=True) for t in tables)
    context = np.concatenate([ids[:-1] for ids in windows.ids])
    by_token = (p * np.log(p / q)).sum(1)[context]
    assert side.metrics["kl_divergence"].value == pytest.approx(by_token.mean(), rel=1e-6)
    assert side.extra["kl_divergence_max"].value == pytest.approx(by_token.max(), rel=1e-6)
    assert side.extra["kl_divergence_p99"].value == pytest.approx(np.quantile(by_token, 0.99), rel=1e-6)
    assert side.metrics["top1_agreement"].value == np.mean(p.argmax(1)[context] == q.argmax(1)[context])


def test_a_tail_that_too_few_tokens_support_is_not_reported():
    engines = TableEngine(random_table(0)), TableEngine(random_table(1))
    (side,) = compare(engines[0], [engines[1]], random_windows(windows=2), 0, Silent()).candidates
    assert side.extra["kl_divergence_p99"] is None
    assert side.extra["kl_divergence_max"].value > 0


def test_the_first_token_of_a_window_is_context_only():
    table = random_table(0)
    ids = np.array([3, 5, 3, 5])
    longer = Windows(ids=(ids,), cluster=(np.array([9, 0, 1, 1]),))
    outcome = compare(TableEngine(table), [TableEngine(table)], longer, 0, Silent())
    assert outcome.settings["fidelity"]["tokens"] == 3
    assert outcome.settings["fidelity"]["clusters"] == 2


def test_paired_differences_are_far_sharper_than_the_perplexities_themselves():
    table = random_table(0)
    slightly = table + random_table(1, scale=0.01)
    (side,) = compare(TableEngine(table), [TableEngine(slightly)], random_windows(), 0, Silent()).candidates
    perplexity, delta = side.metrics["perplexity"], side.deltas["perplexity"]
    assert (delta.high - delta.low) < 0.05 * (perplexity.high - perplexity.low) / perplexity.value


def test_the_noise_of_another_batch_arrangement_is_measured():
    quiet = TableEngine(random_table(0))
    noisy = TableEngine(random_table(0), batch_noise=1e-3)
    windows = random_windows()
    still = compare(quiet, [quiet], windows, 0, Silent())
    moved = compare(noisy, [noisy], windows, 0, Silent())
    assert still.baseline.metrics["kl_divergence"].value == 0
    assert moved.baseline.metrics["kl_divergence"].value > 0
    delta = moved.candidates[0].deltas["perplexity"]
    assert delta.relative == 0
    assert delta.noise_high - delta.noise_low > 1e-5
    assert delta.detectable == max(-delta.noise_low, delta.noise_high)


def test_noise_can_be_measured_on_one_window_alone(monkeypatch):
    engine = TableEngine(random_table(0), batch_noise=1e-3)
    monkeypatch.setattr(fidelity, "NOISE_ELEMENTS", 17 * 2 * 10)
    (side,) = compare(engine, [engine], random_windows(windows=1), 0, Silent()).candidates
    assert side.deltas["perplexity"].noise_low < side.deltas["perplexity"].noise_high


def test_a_single_document_has_no_interval_and_says_so():
    engine = TableEngine(random_table(0))
    outcome = compare(engine, [engine], random_windows(documents=1), 0, Silent())
    assert outcome.candidates[0].deltas["perplexity"].low is None
    assert outcome.baseline.metrics["perplexity"].high is None
    assert "one document" in outcome.notes[0]


def test_a_few_documents_are_named_and_enough_of_them_are_not():
    engine, many = TableEngine(random_table(0)), random_windows(documents=10)
    for documents in (2, 9):
        (note,) = compare(engine, [engine], random_windows(documents=documents), 0, Silent()).notes
        assert note.startswith(f"the tokens come from {documents} documents only")
        assert note.endswith("read more tokens, or a text of more documents")
    by_window = Windows(ids=many.ids[:2], cluster=many.cluster[:2], clustered_by="window")
    assert compare(engine, [engine], by_window, 0, Silent()).notes[0].endswith("wide: read more tokens")
    assert compare(engine, [engine], many, 0, Silent()).notes == ()


def test_intervals_of_two_documents_stay_within_what_the_metrics_can_be():
    table = random_table(0)
    engines = TableEngine(table), TableEngine(table + random_table(1))
    (side,) = compare(engines[0], [engines[1]], random_windows(documents=2), 0, Silent()).candidates
    perplexity, agree = side.metrics["perplexity"], side.metrics["top1_agreement"]
    assert 0 < perplexity.low < perplexity.value < perplexity.high
    assert 0 <= agree.low < agree.value < agree.high <= 1
    assert 0 <= side.metrics["kl_divergence"].low < side.metrics["kl_divergence"].value
    assert -1 < side.deltas["perplexity"].low < side.deltas["perplexity"].relative


def test_no_disagreement_among_few_tokens_does_not_prove_that_there_is_none():
    engine = TableEngine(random_table(0))
    (side,) = compare(engine, [engine], random_windows(), 0, Silent()).candidates
    assert side.metrics["top1_agreement"].low == pytest.approx(1 - 3 / (12 * 39), abs=1e-4)


def test_two_runs_agree_in_every_bit_and_candidates_do_not_touch_each_other():
    engines = [TableEngine(random_table(seed)) for seed in range(3)]
    both = compare(engines[0], engines[1:], random_windows(), 7, Silent())
    alone = compare(engines[0], engines[2:], random_windows(), 7, Silent())
    assert both.candidates[1] == alone.candidates[0]
    assert both == compare(engines[0], engines[1:], random_windows(), 7, Silent())


def test_another_vocabulary_is_refused():
    with pytest.raises(UsageError, match="18 logits a token and the baseline 17"):
        compare(
            TableEngine(random_table(0)),
            [TableEngine(random_table(0, vocab=18))],
            random_windows(),
            0,
            Silent(),
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    table = random_table(0)
    broken = table.copy()
    broken[4, 4] = bad
    with pytest.raises(LlmoptError, match="NaN or Inf"):
        compare(TableEngine(table), [TableEngine(broken)], random_windows(), 0, Silent())


def test_a_text_without_a_second_token_is_refused():
    windows = Windows(ids=(np.array([1]),), cluster=(np.array([0]),))
    with pytest.raises(UsageError, match="too short"):
        compare(TableEngine(random_table(0)), [TableEngine(random_table(0))], windows, 0, Silent())
