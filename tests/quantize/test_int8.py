"""Codes for int8 products: no pair saturates, and no more of the range is given up for it than must be."""

import itertools

import pytest
import torch
from torch import Tensor

from llmopt.quantize.int8 import CENTER, LARGEST_SUM, limit_pairs, pair_sums, quantize_rows, sums_fit
from llmopt.quantize.scheme import parse_scheme

W8A8 = parse_scheme("w8a8")


def random_weight(columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn((16, columns), generator=torch.Generator().manual_seed(seed))


def test_sums_are_of_neighbours_of_one_sign() -> None:
    values = torch.tensor([[1.0, 2.0, -3.0, -4.0, 5.0, -6.0, 0.0, -7.0, 8.0]])
    assert pair_sums(values).tolist() == [[3, -7, 0, 0, 8]]


def test_the_largest_sum_fits_16_bits_with_the_largest_activations() -> None:
    assert 255 * LARGEST_SUM < 2**15
    assert 255 * -LARGEST_SUM >= -(2**15)


@pytest.mark.parametrize(("first", "second"), [(127, 127), (-128, -128), (127, 2), (-128, -3), (100, 60), (64, 65)])
def test_a_pair_that_is_too_large_goes_to_the_nearest_that_is_not(first: int, second: int) -> None:
    limited = limit_pairs(torch.tensor([[float(first), float(second)]]))[0]
    assert sums_fit((limited + CENTER).to(torch.uint8)[None])
    distance = float((limited - torch.tensor([first, second])).square().sum())
    allowed = (pair for pair in itertools.product(range(-128, 128), repeat=2) if abs(sum(pair)) <= LARGEST_SUM)
    assert distance == min((a - first) ** 2 + (b - second) ** 2 for a, b in allowed)


def test_pairs_that_fit_stay_as_they_are() -> None:
    codes = torch.tensor([[64.0, 64.0, -128.0, 0.0, 127.0, -128.0, 100.0, 28.0, 127.0]])
    assert torch.equal(limit_pairs(codes), codes)


@pytest.mark.parametrize("columns", [1, 2, 7, 64])
@pytest.mark.parametrize("outlier", [1.0, 1000.0])
def test_no_weight_gets_codes_that_saturate(columns: int, outlier: float) -> None:
    weight = random_weight(columns)
    weight[:, 0] *= outlier
    quantized = quantize_rows(weight, W8A8)
    assert quantized.codes_OI.shape == weight.shape
    assert sums_fit(quantized.codes_OI)


def test_a_row_whose_neighbours_are_small_keeps_the_full_range() -> None:
    weight = random_weight()
    weight[:, 1::2] = 0
    quantized = quantize_rows(weight, W8A8)
    assert torch.equal(quantized.codes_OI.min(1).values, torch.zeros(16, dtype=torch.uint8))
    torch.testing.assert_close(quantized.scales_OG[:, 0].abs(), weight.abs().amax(1) / 128)


def test_no_smaller_scale_has_less_error() -> None:
    weight = random_weight(576)
    quantized = quantize_rows(weight, W8A8)
    error = (quantized.dequantize() - weight).square().sum(1)
    for share in (0.95, 0.9, 0.8):
        scale = quantized.scales_OG * share
        codes = limit_pairs((weight / scale).round().clamp(-128, 127))
        assert (error < (codes * scale - weight).square().sum(1)).float().mean() > 0.8
