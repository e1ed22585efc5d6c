"""What parts of a block take, from the speeds of a device."""

import pytest

from llmopt.partition.device import Attending, DeviceClass, Speed
from llmopt.partition.work import Product, attention_s, passing_s, product_s

BARE = Speed(tflops=0.1, gb_per_s=10)
FULL = Speed(tflops=0.1, gb_per_s=10, row_ns=100, packing_gb_per_s=5, passing_gb_per_s=8, call_us=7)


def product(tokens: int) -> Product:
    return Product(rows=1000, columns=500, weight_bytes=2e6, tokens=tokens, value_bytes=4)


def test_a_token_reads_the_weights_row_by_row():
    assert product_s(product(1), BARE) == pytest.approx(2e6 / 1e10)
    assert product_s(product(1), FULL) == pytest.approx(7e-6 + 2e6 / 1e10 + 1000 * 1e-7)


def test_where_only_peaks_are_known_the_longer_of_two_counts():
    assert product_s(product(2), BARE) == pytest.approx(2e6 / 1e10)
    assert product_s(product(1000), BARE) == pytest.approx(2 * 1000 * 1000 * 500 / 1e11)


def test_several_tokens_wait_for_weights_to_be_packed_and_for_values_to_pass():
    expected = 7e-6 + 2e6 / 5e9 + 2 * 64 * 5e5 / 1e11 + 64 * 1500 * 4 / 8e9
    assert product_s(product(64), FULL) == pytest.approx(expected)


def test_factors_hold_at_their_tokens_between_them_and_beyond():
    off = FULL.model_copy(update={"factors": [(16, 1.0), (1, 3.0), (4, 2.0)]})
    for tokens, factor in ((1, 3), (2, 2.5), (4, 2), (8, 1.5), (16, 1), (500, 1)):
        assert product_s(product(tokens), off) == pytest.approx(factor * product_s(product(tokens), FULL))


def test_a_token_alone_has_factors_by_the_length_of_rows():
    off = FULL.model_copy(update={"row_factors": [(250, 1.0), (1000, 2.0)]})
    assert product_s(product(1), off) == pytest.approx(1.5 * product_s(product(1), FULL))
    assert product_s(product(2), off) == pytest.approx(product_s(product(2), FULL))


def test_what_is_not_known_takes_nothing():
    assert passing_s(1e9, None) == 0
    assert passing_s(1e9, 2.0) == pytest.approx(0.5)


def test_attention_has_a_speed_of_its_own_where_one_was_measured():
    plain = DeviceClass(memory_gb=1, speeds={"float32": BARE})
    assert attention_s(1e9, 1e3, plain, BARE) == pytest.approx(1e9 / 1e11)
    known = plain.model_copy(update={"attention": Attending(tflops=0.05, gb_per_s=4)})
    assert attention_s(1e9, 1e3, known, BARE) == pytest.approx(1e9 / 5e10)
    assert attention_s(0, 1e9, known, BARE) == pytest.approx(1 / 4)
