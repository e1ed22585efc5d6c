import numpy as np
import pytest

from llmopt.measure import stats


def ratio(totals):
    return totals[..., 0] / totals[..., 1]


def ratio_interval(sums, seed):
    (interval,) = stats.cluster_intervals(sums, [ratio], seed)
    return interval


def holds(interval, truth):
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize(("percentile", "needed"), [(0.9, 44), (0.99, 459)])
def test_percentiles_need_the_counts_that_mlperf_asks_for(percentile, needed):
    assert stats.max_percentile(needed) >= percentile > stats.max_percentile(needed - 1)


def test_no_samples_support_no_percentile():
    assert stats.max_percentile(0) == 0.0


def test_one_group_has_no_interval():
    assert ratio_interval(np.ones((1, 2)), seed=0) is None
    assert stats.median_interval(np.ones((1, 5)), seed=0) is None
    assert stats.paired_ratio_interval(np.ones((1, 5)), np.ones((1, 5)), seed=0) is None


def test_equal_clusters_have_an_interval_of_no_width():
    assert ratio_interval(np.tile([3.0, 4.0], (7, 1)), seed=0) == (0.75, 0.75)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another_one():
    sums = np.random.default_rng(0).uniform(1, 2, (12, 2))
    assert ratio_interval(sums, seed=1) == ratio_interval(sums, seed=1)
    assert ratio_interval(sums, seed=1) != ratio_interval(sums, seed=2)


def test_many_clusters_do_not_change_the_statistic_but_only_the_size_of_the_chunks(monkeypatch):
    sums = np.random.default_rng(0).uniform(1, 2, (50, 2))
    whole = ratio_interval(sums, seed=3)
    monkeypatch.setattr(stats, "CHUNK_ELEMENTS", 1_000)
    assert ratio_interval(sums, seed=3) == pytest.approx(whole, abs=1e-12)


def coverage(rng, clusters, means_of, trials=400):
    """How often the interval holds 0.02, the mean of what documents of unequal length add."""
    hits = 0
    for trial in range(trials):
        tokens = np.round(rng.lognormal(5, 0.7, clusters))
        interval = ratio_interval(np.stack([tokens * means_of(clusters), tokens], 1), seed=trial)
        hits += holds(interval, 0.02)
    return hits / trials


@pytest.mark.parametrize("clusters", [2, 3, 4, 6, 12, 40])
def test_the_cluster_interval_holds_the_truth_about_as_often_as_it_says(clusters, monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 1_000)
    rng = np.random.default_rng(clusters)
    assert 0.92 <= coverage(rng, clusters, lambda count: rng.normal(0.02, 0.02, count)) <= 0.98


@pytest.mark.parametrize("clusters", [2, 3, 4, 6, 12, 40])
def test_documents_of_which_a_few_are_bad_cost_the_interval_little(clusters, monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 1_000)
    rng = np.random.default_rng(clusters)
    assert coverage(rng, clusters, lambda count: rng.exponential(0.02, count)) >= 0.86


def test_two_clusters_say_far_less_than_they_seem_to():
    """Between the two ratios the truth lies every second time only; Student's t with one degree of freedom knows."""
    low, high = ratio_interval(np.array([[1.0, 100.0], [3.0, 100.0]]), seed=0)
    assert (low + high) / 2 == pytest.approx(0.02)
    assert (high - low) / 2 == pytest.approx(12.706 * 0.01, rel=1e-4)


def test_tokens_taken_for_independent_would_be_far_too_sure():
    """Why documents are the unit: the same data, each document cut into tokens, gives a much narrower interval."""
    rng = np.random.default_rng(0)
    means = 0.02 + rng.normal(0, 0.02, 20)
    tokens = means[:, None] + rng.normal(0, 0.01, (20, 50))
    by_document = ratio_interval(np.stack([tokens.sum(1), np.full(20, 50.0)], 1), seed=0)
    by_token = ratio_interval(np.stack([tokens.ravel(), np.ones(1000)], 1), seed=0)
    assert (by_document.high - by_document.low) > 5 * (by_token.high - by_token.low)


def calls(rng, rounds, slower=1.0, drift=0.0):
    """Latencies with a spread between processes, a spread between calls, and now and then a hiccup."""
    process = rng.normal(0, 0.01, (rounds, 1)) + drift * np.arange(rounds)[:, None]
    hiccup = rng.exponential(0.3, (rounds, 8)) * (rng.random((rounds, 8)) < 0.1)
    return slower * np.exp(process + rng.normal(0, 0.03, (rounds, 8)) + hiccup)


@pytest.mark.parametrize("rounds", [2, 3, 4, 8])
def test_the_ratio_interval_holds_the_truth_even_when_the_machine_drifts(rounds, monkeypatch):
    monkeypatch.setattr(stats, "ROUND_RESAMPLES", 800)
    rng = np.random.default_rng(rounds)
    trials = 200
    intervals = [
        stats.paired_ratio_interval(calls(rng, rounds, 1.1, drift=0.03), calls(rng, rounds, drift=0.03), seed=trial)
        for trial in range(trials)
    ]
    assert sum(holds(interval, 1.1) for interval in intervals) / trials >= 0.95


def test_a_planted_slow_down_is_seen_and_none_is_not():
    rng = np.random.default_rng(5)
    baseline, again, slower = calls(rng, 6), calls(rng, 6), calls(rng, 6, 1.1)
    assert holds(stats.paired_ratio_interval(again, baseline, seed=0), 1.0)
    assert stats.paired_ratio_interval(slower, baseline, seed=0).low > 1.0
    assert stats.paired_ratio(slower, baseline) == pytest.approx(1.1, rel=0.03)


def test_what_slows_a_whole_round_cancels():
    rng = np.random.default_rng(6)
    baseline, candidate = calls(rng, 6), calls(rng, 6)
    weather = np.array([1, 1, 3, 1, 2, 1.5])[:, None]
    assert stats.paired_ratio(candidate * weather, baseline * weather) == pytest.approx(
        stats.paired_ratio(candidate, baseline)
    )


def test_identical_calls_give_a_ratio_of_exactly_one():
    same = np.random.default_rng(0).uniform(1, 2, (6, 1))
    assert stats.paired_ratio(same, same) == 1.0
    assert stats.paired_ratio_interval(same, same, seed=0) == (1.0, 1.0)


def test_the_median_interval_lies_around_the_median():
    sample = calls(np.random.default_rng(1), 6)
    interval = stats.median_interval(sample, seed=0)
    assert interval.low < stats.pooled_median(sample) < interval.high
