import numpy as np
import pytest

from llmopt.measure import tokens
from llmopt.measure.tokens import score


def one_token_at_a_time(baseline_TV, candidate_TV, targets_T):
    """The definitions, in float64, one position after the other."""
    rows = []
    for a, b, target in zip(baseline_TV.astype(float), candidate_TV.astype(float), targets_T, strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        kl = sum(pi * np.log(pi / qi) for pi, qi in zip(p, q, strict=True))
        rows.append((-np.log(p[target]), -np.log(q[target]), kl, a.argmax() == b.argmax()))
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    baseline_TV = rng.normal(0, 3, (23, 101)).astype(np.float32)
    candidate_TV = baseline_TV + rng.normal(0, 0.3, (23, 101)).astype(np.float32)
    return baseline_TV, candidate_TV, rng.integers(0, 101, 23)


def test_scores_are_their_definitions(case):
    baseline_nll, candidate_nll, kl, agree = one_token_at_a_time(*case)
    scores = score(*case)
    np.testing.assert_allclose(scores.baseline_nll, baseline_nll, rtol=1e-6)
    np.testing.assert_allclose(scores.candidate_nll, candidate_nll, rtol=1e-6)
    np.testing.assert_allclose(scores.kl, kl, atol=1e-7)
    np.testing.assert_array_equal(scores.agree, agree)


def test_chunks_do_not_change_the_scores(case, monkeypatch):
    whole = score(*case)
    monkeypatch.setattr(tokens, "CHUNK_ELEMENTS", 250)
    parts = score(*case)
    np.testing.assert_array_equal(parts.kl, whole.kl)
    np.testing.assert_array_equal(parts.candidate_nll, whole.candidate_nll)


def test_a_model_against_itself_is_exactly_no_distance_away(case):
    baseline_TV, _, targets_T = case
    scores = score(baseline_TV, baseline_TV, targets_T)
    assert not scores.kl.any()
    assert scores.agree.all()


def test_a_constant_added_to_all_logits_changes_nothing(case):
    baseline_TV, _, targets_T = case
    scores = score(baseline_TV, baseline_TV + np.float32(8), targets_T)
    np.testing.assert_allclose(scores.kl, 0, atol=1e-6)
    np.testing.assert_allclose(scores.candidate_nll, scores.baseline_nll, atol=1e-5)


def test_a_small_divergence_in_a_large_vocabulary_keeps_its_digits():
    """Differences of 0.01 in each logit are a KL of about 5e-5 nats: float32 sums of 50,000 terms would lose it."""
    rng = np.random.default_rng(1)
    baseline_TV = rng.normal(0, 3, (3, 50_000)).astype(np.float32)
    candidate_TV = baseline_TV + rng.normal(0, 0.01, baseline_TV.shape).astype(np.float32)
    targets_T = np.array([1, 2, 3])
    _, _, kl, _ = one_token_at_a_time(baseline_TV, candidate_TV, targets_T)
    np.testing.assert_allclose(score(baseline_TV, candidate_TV, targets_T).kl, kl, rtol=2e-3)


def test_logits_too_large_for_exp_are_no_problem():
    baseline_TV = np.array([[500.0, 0.0]], np.float32)
    scores = score(baseline_TV, baseline_TV[:, ::-1], np.array([0]))
    assert scores.kl[0] == pytest.approx(500)
    assert scores.candidate_nll[0] == pytest.approx(500)
