import numpy as np

from llmopt.measure.cautions import calls_cautions, load_cautions, noise_cautions
from llmopt.measure.timing import Calls
from llmopt.report.results import Delta

STEADY = np.full((4, 5), 10.0)


def calls(tpot_ms=STEADY, settled=True):
    return Calls(ttft_ms=STEADY, tpot_ms=tpot_ms, peak_rss_bytes=None, warmup_calls=4, settled=settled)


def test_a_steady_measurement_has_no_cautions():
    assert list(calls_cautions([("one", calls())])) == []


def test_a_load_above_half_the_cores_is_named():
    assert list(load_cautions(2.0, 4)) == []
    assert list(load_cautions(None, 4)) == []
    assert "2.1 on 4 cores" in next(load_cautions(2.1, 4))


def test_a_drift_of_more_than_three_percent_is_named_with_the_variant_and_its_size():
    drifting = STEADY * np.array([1, 1.01, 1.03, 1.05])[:, None]
    slight = STEADY * np.array([1, 1.01, 1.02, 1.029])[:, None]
    (caution,) = calls_cautions([("one", calls()), ("two", calls(drifting)), ("three", calls(slight))])
    assert caution.startswith("tpot_ms moved")
    assert "(two +5%)" in caution


def test_calls_that_scatter_by_more_than_ten_percent_are_named():
    scattered = STEADY * np.array([0.85, 1, 1, 1, 1.4])
    (caution,) = calls_cautions([("one", calls(scattered))])
    assert "one 18%" in caution


def test_a_variant_that_never_settled_is_named():
    (caution,) = calls_cautions([("one", calls(settled=False)), ("two", calls())])
    assert caution.startswith("one: calls were still changing")


def test_a_baseline_that_differs_from_itself_is_named():
    noise = {"ttft_ms": Delta(relative=0.0, low=-0.01, high=0.01), "tpot_ms": Delta(relative=0.04, low=0.01, high=0.06)}
    (caution,) = noise_cautions(noise)
    assert caution.startswith("tpot_ms: the baseline measured against itself differs by +4.0%")
    assert list(noise_cautions({"tpot_ms": Delta(relative=0.1)})) == []
