import pytest

from llmopt.report import numbers
from llmopt.report.results import METRICS, Delta, Measurement


def measured(metric, value, low=None, high=None):
    return Measurement(value=value, low=low, high=high, n=1, unit=METRICS[metric][0])


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("perplexity", 28.7041, "28.70"),
        ("size_bytes", 143_200_000, "143.2 MB"),
        ("size_bytes", 3_250_000_000, "3.250 GB"),
        ("size_bytes", 999, "999.0 bytes"),
        ("size_bytes", 0, "0 bytes"),
        ("top1_agreement", 0.98214, "98.21 %"),
        ("kl_divergence", 0.001234, "0.001234"),
        ("kl_divergence", 1.3e-9, "1.3e-09"),
        ("kl_divergence", -2e-8, "-2.0e-08"),
        ("kl_divergence", 0.0, "0"),
        ("tpot_ms", 8.1, "8.100 ms"),
        ("ttft_ms", 123_456.0, "123456 ms"),
        ("decode_tokens_per_s", 123.456, "123.5 tokens/s"),
    ],
)
def test_values_have_four_digits_and_a_unit(metric, value, text):
    assert numbers.value_text(metric, measured(metric, value)) == text


def test_an_interval_has_the_digits_and_the_unit_of_its_value():
    assert numbers.interval_text("perplexity", measured("perplexity", 28.7, 27.911, 9.5)) == "[27.91, 9.50]"
    assert numbers.interval_text("peak_rss_bytes", measured("peak_rss_bytes", 2e9, 1.9e9, 2.1e9)) == "[1.900, 2.100]"
    assert numbers.interval_text("top1_agreement", measured("top1_agreement", 0.98, 0.97, 0.99)) == "[97.00, 99.00]"


def test_what_was_not_measured_is_a_dash_and_never_a_zero():
    assert numbers.value_text("perplexity", None) == numbers.change_text(None) == "—"
    assert numbers.interval_text("perplexity", None) == numbers.interval_text("tpot_ms", measured("tpot_ms", 3)) == ""
    assert numbers.change_interval_text(Delta(relative=0.1)) == numbers.change_interval_text(None) == ""
    assert numbers.noise_text(Delta(relative=0.1)) == numbers.noise_text(None) == ""
    assert numbers.detectable_text(Delta(relative=0.1)) == numbers.detectable_text(None) == ""


@pytest.mark.parametrize(
    ("relative", "low", "high", "text"),
    [
        (0.0003, 0.0001, 0.0005, "+0.030 % [+0.010, +0.050]"),
        (-0.6, -0.61, -0.59, "-60.0 % [-61.0, -59.0]"),
        (0.0118, 0.011, 0.0126, "+1.18 % [+1.10, +1.26]"),
        (0.0, 0.0, 0.0, "+0.0 % [+0.0, +0.0]"),
    ],
)
def test_changes_are_signed_percentages(relative, low, high, text):
    delta = Delta(relative=relative, low=low, high=high)
    assert f"{numbers.change_text(delta)} {numbers.change_interval_text(delta)}" == text


def test_noise_is_the_larger_end_and_detectable_is_never_below_it():
    delta = Delta(relative=0.05, low=0.048, high=0.051, noise_low=-0.004, noise_high=0.006)
    assert numbers.noise_text(delta) == "±0.60 %"
    assert numbers.detectable_text(delta) == "0.60 %"
    wider = Delta(relative=0.05, low=0.03, high=0.06, noise_low=-0.004, noise_high=0.006)
    assert numbers.detectable_text(wider) == "2.0 %"


def test_noise_below_a_hundredth_of_a_percent_is_only_called_so():
    assert numbers.noise_text(Delta(relative=0, noise_low=-1e-7, noise_high=0)) == "<0.01 %"
    assert numbers.noise_text(Delta(relative=0.0, noise_low=0.0, noise_high=0.0)) == "±0 %"
