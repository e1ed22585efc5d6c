import pytest

from llmopt.errors import ExitCode, UsageError
from llmopt.report.gates import exit_code, judge, parse_gate
from llmopt.report.results import Candidate, Delta, GateResult, Measurement, Report


def report(*, metrics=None, deltas=None, candidates=("one",)):
    made = tuple(
        Candidate(name=name, engine="fake 1", metrics=metrics or {}, deltas=deltas or {}) for name in candidates
    )
    return Report(host={}, versions={}, seed=0, baseline=None, candidates=made)


def tpot(low, high, value=None):
    measured = Measurement(value=(low + high) / 2 if value is None else value, low=low, high=high, n=48, unit="ms")
    return report(metrics={"tpot_ms": measured})


def perplexity_change(low, high):
    return report(deltas={"perplexity": Delta(relative=(low + high) / 2, low=low, high=high)})


def verdict(expr, of):
    (result,) = judge(parse_gate(expr), of)
    return result.verdict


@pytest.mark.parametrize(
    ("expr", "against", "bound"),
    [
        ("perplexity <= +1%", "change", 0.01),
        ("prefill_tokens_per_s >= -5%", "change", -0.05),
        ("size_bytes<=-70.5 %", "change", -0.705),
        ("tpot_ms <= 0.8x", "ratio", 0.8),
        ("tpot_ms <= 20", "value", 20),
        ("tpot_ms < 20 ms", "value", 20),
        ("ttft_ms <= 1.5s", "value", 1500),
        ("size_bytes <= 150MB", "value", 150e6),
        ("peak_rss_bytes <= 1.5GiB", "value", 1.5 * 2**30),
        ("top1_agreement >= 0.98", "value", 0.98),
        ("top1_agreement >= 98%", "value", 0.98),
        ("kl_divergence <= 5e-2", "value", 0.05),
        ("decode_tokens_per_s > 40tokens/s", "value", 40),
        ("  perplexity<30  ", "value", 30),
    ],
)
def test_a_gate_is_read(expr, against, bound):
    gate = parse_gate(expr)
    assert (gate.against, gate.bound) == (against, pytest.approx(bound))
    assert gate.expr == expr.strip()


@pytest.mark.parametrize(
    ("expr", "message"),
    [
        ("perplexity", "not a gate"),
        ("perplexity == 3", "not a gate"),
        ("perplexity <= lots", "not a gate"),
        ("perplexity <= 1 <= 2", "not a gate"),
        ("", "not a gate"),
        ("perplexity <= 1%", r"a change against the baseline has one: \+1%"),
        ("perplexity <= +1", "a sign stands before a percentage"),
        ("tpot_ms <= -0.8x", "a sign stands before a percentage"),
        ("tpot_ms <= 20MB", "use us, ms, s"),
        ("size_bytes <= 150Mb", "use B, kB, KB, MB"),
        ("perplexity <= 30ms", "use a plain number"),
        ("kl_divergence <= +1%", "itself a comparison"),
        ("top1_agreement >= 0.9x", "itself a comparison"),
        ("top1_agreement >= 98", "write 98%"),
        ("top1_agreement >= 101", "a share lies between 0 and 1"),
    ],
)
def test_what_is_no_gate_is_a_usage_error_that_says_what_would_be(expr, message):
    with pytest.raises(UsageError) as caught:
        parse_gate(expr)
    assert caught.match(message)
    assert caught.value.exit_code == ExitCode.USAGE


def test_an_unknown_metric_gets_the_near_one_and_the_list():
    with pytest.raises(UsageError, match="unknown metric 'perplexty'") as caught:
        parse_gate("perplexty <= 3")
    assert "did you mean 'perplexity'?" in caught.value.hint
    assert "peak_rss_bytes" in caught.value.hint


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(17, 19, "pass"), (17, 20, "pass"), (19, 21, "inconclusive"), (20, 21, "inconclusive"), (20.5, 22, "fail")],
)
def test_at_most_is_judged_on_the_whole_interval(low, high, expected):
    assert verdict("tpot_ms <= 20", tpot(low, high)) == expected


@pytest.mark.parametrize(
    ("expr", "expected"),
    [("tpot_ms < 20", "inconclusive"), ("tpot_ms >= 19", "pass"), ("tpot_ms > 19", "inconclusive"),
     ("tpot_ms > 20", "fail"), ("tpot_ms < 19", "fail"), ("tpot_ms >= 20.1", "fail")],
)  # fmt: skip
def test_each_operator_treats_its_own_bound_as_it_should(expr, expected):
    assert verdict(expr, tpot(19, 20)) == expected


def test_a_value_inside_does_not_pass_when_its_interval_straddles():
    assert verdict("tpot_ms <= 20", tpot(18, 25, value=19)) == "inconclusive"


def test_a_change_is_judged_on_the_paired_interval():
    assert verdict("perplexity <= +1%", perplexity_change(0.002, 0.008)) == "pass"
    assert verdict("perplexity <= +1%", perplexity_change(0.008, 0.012)) == "inconclusive"
    assert verdict("perplexity <= +1%", perplexity_change(0.011, 0.012)) == "fail"


def test_a_ratio_shows_the_ratio():
    change = report(deltas={"tpot_ms": Delta(relative=-0.25, low=-0.3, high=-0.21)})
    (result,) = judge(parse_gate("tpot_ms <= 0.8x"), change)
    assert (result.verdict, result.value) == ("pass", 0.75)
    assert (result.low, result.high) == (pytest.approx(0.7), pytest.approx(0.79))


def test_a_size_has_no_interval_and_needs_none():
    size = Measurement(value=140e6, n=1, unit="bytes")
    sized = report(metrics={"size_bytes": size}, deltas={"size_bytes": Delta(relative=-0.74)})
    assert verdict("size_bytes <= 150MB", sized) == "pass"
    assert verdict("size_bytes <= 139MB", sized) == "fail"
    assert verdict("size_bytes <= -70%", sized) == "pass"


def test_a_sampled_metric_without_an_interval_decides_nothing():
    assert verdict("tpot_ms <= 20", report(metrics={"tpot_ms": Measurement(value=1, n=1, unit="ms")})) == "inconclusive"
    assert verdict("perplexity <= +1%", report(deltas={"perplexity": Delta(relative=0.0)})) == "inconclusive"


@pytest.mark.parametrize("expr", ["tpot_ms <= 20", "perplexity <= +1%", "tpot_ms <= 2x", "size_bytes <= 1GB"])
def test_what_was_not_measured_is_null_and_inconclusive(expr):
    (result,) = judge(parse_gate(expr), report())
    assert (result.verdict, result.value, result.low, result.high) == ("inconclusive", None, None, None)


def test_a_gate_holds_for_every_candidate():
    results = judge(parse_gate("tpot_ms <= 20"), report(candidates=("one", "two")))
    assert [result.candidate for result in results] == ["one", "two"]


def results(*verdicts):
    return [GateResult(expr="", verdict=each, value=None, low=None, high=None) for each in verdicts]


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ((), ExitCode.DONE),
        (("pass", "pass"), ExitCode.DONE),
        (("pass", "inconclusive"), ExitCode.INCONCLUSIVE),
        (("inconclusive", "fail", "pass"), ExitCode.GATE_FAILED),
    ],
)
def test_the_worst_verdict_is_the_exit_code(verdicts, code):
    assert exit_code(results(*verdicts)) == code
