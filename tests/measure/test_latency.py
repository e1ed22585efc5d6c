import json
import sys
from collections import Counter

import pytest

from llmopt.errors import LlmoptError, UsageError
from llmopt.measure import latency
from llmopt.measure.latency import LatencySettings, measure_latency, schedule
from llmopt.progress import Silent

SETTINGS = LatencySettings(threads=1, prompt_tokens=4, output_tokens=3, rounds=6, repetitions=8)

# A measuring process without a model. The artifact is a text file with a factor of slowness; calls scatter by 3 %,
# processes by 1 %, and each keeps a log of what it was asked.
FAKE = """
import json, pathlib, random, sys
job = json.load(sys.stdin)
path = pathlib.Path(job["path"])
with open(path.parent / "log", "a") as log:
    log.write(json.dumps(job) + "\\n")
factor = float(path.read_text())
draw = random.Random(sum(1 for _ in open(path.parent / "log")))
process = draw.gauss(1, 0.01)
calls = lambda ms: [ms * factor * process * draw.gauss(1, 0.03) for _ in range(job["repetitions"])]
print(json.dumps({"engine": "fake 1", "vocab_size": 50 + len(path.name), "ttft_ms": calls(100), "tpot_ms": calls(10),
                  "warmup_calls": 4, "settled": True, "peak_rss_bytes": int(1e8 * factor)}))
"""


def artifacts(folder):
    for name, factor in (("base", 1.0), ("same", 1.0), ("slower", 1.1)):
        (folder / name).write_text(str(factor))
    return folder


@pytest.fixture
def folder(tmp_path):
    return artifacts(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same artifact and a slower one against the baseline: the outcome, and the jobs that were done for it."""
    folder = artifacts(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "load_average", lambda: 0.1)
        outcome = measure(folder, ["same", "slower"])
    return outcome, [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def measure(folder, candidates, settings=SETTINGS):
    paths = [folder / name for name in candidates]
    command = [sys.executable, "-c", FAKE]
    return measure_latency(folder / "base", paths, settings, seed=0, progress=Silent(), command=command)


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(latency, "load_average", lambda: 0.1)


def test_a_planted_slow_down_is_seen_and_the_same_artifact_is_not(whole):
    same, slower = (side.deltas for side in whole[0].candidates)
    for metric in ("ttft_ms", "tpot_ms", "prefill_tokens_per_s", "decode_tokens_per_s"):
        assert same[metric].low <= 0 <= same[metric].high
        assert same[metric].detectable < 0.05
        assert same[metric].noise_low <= 0 <= same[metric].noise_high
    assert slower["tpot_ms"].low > 0.05
    assert slower["tpot_ms"].relative == pytest.approx(0.1, abs=0.03)
    assert slower["decode_tokens_per_s"].high < -0.05
    assert slower["peak_rss_bytes"].relative == pytest.approx(0.1)


def test_metrics_are_medians_with_counts_and_rates_follow_from_times(whole):
    outcome, _ = whole
    metrics = outcome.candidates[0].metrics
    assert metrics["ttft_ms"].value == pytest.approx(100, rel=0.03)
    assert metrics["prefill_tokens_per_s"].value == pytest.approx(4000 / metrics["ttft_ms"].value, rel=1e-3)
    assert metrics["decode_tokens_per_s"].value == pytest.approx(1000 / metrics["tpot_ms"].value, rel=1e-3)
    assert metrics["tpot_ms"].low < metrics["tpot_ms"].value < metrics["tpot_ms"].high
    assert (metrics["tpot_ms"].n, outcome.baseline.metrics["tpot_ms"].n) == (48, 96)
    assert metrics["peak_rss_bytes"].n == 6


def test_a_percentile_stands_only_where_the_calls_support_it(whole):
    outcome, _ = whole
    extra = outcome.candidates[0].extra
    assert extra["tpot_ms_p90"].value <= extra["tpot_ms_max"].value
    assert extra["tpot_ms_p99"] is None
    assert extra["warmup_calls"].value == 6 * 4
    assert any("48 calls cannot support p99" in note for note in outcome.notes)


def test_all_variants_get_the_same_tokens_and_only_such_as_all_know(whole):
    _, jobs = whole
    opened, measured = jobs[:3], jobs[3:]
    assert all(job["repetitions"] == 0 for job in opened)
    assert len(measured) == 6 * 4
    assert len({(tuple(job["prompt_ids"]), tuple(job["continuation_ids"])) for job in measured}) == 1
    assert (len(measured[0]["prompt_ids"]), len(measured[0]["continuation_ids"])) == (4, 2)
    assert max(measured[0]["prompt_ids"] + measured[0]["continuation_ids"]) < 54


def rounds_of(variants, rounds, seed):
    order = list(schedule(variants, rounds, seed))
    return [order[start : start + variants] for start in range(0, len(order), variants)]


def test_each_round_runs_every_variant_once_and_pairs_of_rounds_mirror_each_other():
    rounds = rounds_of(5, 6, seed=3)
    assert len(rounds) == 6
    assert all(sorted(each) == [0, 1, 2, 3, 4] for each in rounds)
    assert all(second == first[::-1] for first, second in zip(rounds[::2], rounds[1::2], strict=True))
    assert len({tuple(each) for each in rounds}) == 6


def test_a_steady_drift_of_the_machine_falls_on_all_variants_alike():
    places = [
        [each.index(variant) + 5 * number for number, each in enumerate(rounds_of(5, 6, 0))] for variant in range(5)
    ]
    assert len({sum(place) for place in places}) == 1


def test_the_order_comes_from_the_seed():
    assert list(schedule(4, 3, 1)) == list(schedule(4, 3, 1))
    assert len({tuple(schedule(4, 1, seed)) for seed in range(20)}) > 5


def test_one_round_has_no_interval_and_says_so(folder, quiet):
    outcome = measure(folder, ["same"], LatencySettings(threads=1, rounds=1, repetitions=2))
    assert outcome.candidates[0].deltas["tpot_ms"].low is None
    assert outcome.candidates[0].deltas["tpot_ms"].noise_low is None
    assert any("single round" in note for note in outcome.notes)


def test_a_busy_machine_is_a_note(folder, monkeypatch):
    monkeypatch.setattr(latency, "load_average", lambda: 64.0)
    monkeypatch.setattr(latency, "usable_cores", lambda: 4)
    outcome = measure(folder, ["same"], LatencySettings(threads=1, rounds=2, repetitions=2))
    assert any("load average was 64 on 4 cores" in note for note in outcome.notes)
    assert outcome.settings["latency"]["load_before"] == 64.0


def test_a_broken_artifact_is_found_before_anything_is_measured(folder, quiet):
    (folder / "slower").write_text("not a number")
    with pytest.raises(LlmoptError, match="not a number"):
        measure(folder, ["same", "slower"])
    assert Counter(json.loads(line)["repetitions"] for line in (folder / "log").read_text().splitlines()) == {0: 3}


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"output_tokens": 1}, {"threads": 0}, {"timeout_s": 0}])
def test_settings_that_measure_nothing_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        LatencySettings(**{"threads": 1} | wrong)
