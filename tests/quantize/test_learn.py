"""A weight that learns, against autograd and torch's own optimizers."""

import pytest
import torch
from torch import Tensor

from llmopt.quantize.gptq import Gptq
from llmopt.quantize.grid import ScaleRule
from llmopt.quantize.int8 import sums_fit
from llmopt.quantize.learn import START, LearnedWeight, Rates
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from llmopt.quantize.weights import QuantizedWeight, spread
from tests.quantize.test_gptq import COLUMNS, ROWS, correlated_inputs, output_error, random, statistics

SCHEMES = ["w2a16", "w2a16-asym", "w4a16", "w4a16-sym", "w4a16-channel-sym", "w4a16-g64", "w8a16", "w8a8"]
RATES = Rates(offset=0.02, scale=0.004)


def learned(scheme: str, rates: Rates = RATES) -> tuple[Tensor, QuantizedWeight, LearnedWeight]:
    weight_OI = random(ROWS, COLUMNS)
    quantized = Rtn().quantize(weight_OI, parse_scheme(scheme))
    return weight_OI, quantized, LearnedWeight(quantized, weight_OI, rates)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_begins_as_what_it_was_made_from(scheme: str):
    _, quantized, weight = learned(scheme)
    assert torch.equal(weight.dense(), quantized.dequantize())
    assert torch.equal(weight.quantized().codes_OI, quantized.codes_OI)
    assert torch.equal(weight.quantized().scales_OG, quantized.scales_OG)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_at_all_times_what_it_will_be_stored_as(scheme: str):
    _, _, weight = learned(scheme)
    for step in range(30):
        weight.step(random(ROWS, COLUMNS, seed=step), 1.0)
    stored = weight.quantized()
    assert torch.equal(weight.dense(), stored.dequantize())
    assert int(stored.codes_OI.max()) < stored.scheme.levels
    assert scheme != "w8a8" or sums_fit(stored.codes_OI)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-sym", "w4a16-channel-sym", "w8a8"])
def test_a_step_is_that_of_autograd_through_the_rounding_and_of_torchs_adam(scheme: str):
    weight_OI, quantized, weight = learned(scheme)
    size = quantized.scheme.group_size or COLUMNS
    zeros_OG = quantized.zero_points_OG
    zeros_OI = 2.0 ** (quantized.scheme.bits - 1) if zeros_OG is None else spread(zeros_OG, size, COLUMNS)
    exact_OI = weight_OI / spread(quantized.scales_OG, size, COLUMNS) + zeros_OI
    offsets = (exact_OI - quantized.codes_OI).clamp(-START, START).requires_grad_()
    change = torch.zeros_like(quantized.scales_OG, requires_grad=True)
    adam = torch.optim.Adam([change], lr=RATES.scale, betas=(0.9, 0.99), eps=1e-12)
    target_OI = random(ROWS, COLUMNS, seed=9)
    for _ in range(12):
        moved_OI = quantized.codes_OI + offsets
        rounded_OI = moved_OI + (moved_OI.round().clamp(0, quantized.scheme.levels - 1) - moved_OI).detach()
        codes_OI = quantized.codes_OI.float() if scheme == "w8a8" else rounded_OI
        dense_OI = (codes_OI - zeros_OI) * spread(quantized.scales_OG, size, COLUMNS)
        dense_OI = dense_OI * (1 + change).repeat_interleave(size, 1)[:, :COLUMNS]
        assert torch.allclose(weight.dense(), dense_OI, atol=1e-5)
        adam.zero_grad()
        offsets.grad = None
        (dense_OI - target_OI).square().sum().backward()
        weight.step(2 * (weight.dense() - target_OI), 1.0)
        adam.step()
        if offsets.grad is not None:
            with torch.no_grad():
                offsets.sub_(RATES.offset * offsets.grad.sign())


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-sym"])
def test_outputs_err_less_than_behind_gptq_once_scales_have_learnt_from_them(scheme: str):
    weight_OI, x = random(ROWS, COLUMNS), correlated_inputs()
    quantized = Gptq().quantize(weight_OI, parse_scheme(scheme), statistics(x))
    weight = LearnedWeight(quantized, weight_OI, Rates(offset=0.0, scale=0.0005))
    for step in range(200):
        weight.step((weight.dense() - weight_OI) @ x.T @ x, 1 - step / 200)
    assert output_error(weight_OI, weight.quantized(), x) < 0.95 * output_error(weight_OI, quantized, x)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-sym"])
def test_roundings_learn_to_make_up_for_each_other(scheme: str):
    """Rounded to nearest, the sum of a row is off by many errors; one code or another takes that back."""
    weight_OI, quantized, weight = learned(scheme, Rates(offset=0.005, scale=0.0))
    before = (quantized.dequantize() - weight_OI).sum(1)
    for step in range(100):
        off_O1 = (weight.dense() - weight_OI).sum(1, keepdim=True)
        weight.step(off_O1.expand(ROWS, COLUMNS).contiguous(), 1 - step / 100)
    after = (weight.quantized().dequantize() - weight_OI).sum(1)
    assert after.square().sum() < 0.5 * before.square().sum()


def test_scales_stay_such_as_an_engine_stores():
    weight_OI = random(ROWS, COLUMNS)
    rule = ScaleRule(signed=False, dtype=torch.bfloat16)
    quantized = Rtn(scales=rule).quantize(weight_OI, parse_scheme("w4a16-sym"))
    weight = LearnedWeight(quantized, weight_OI, Rates(offset=0.0, scale=0.05), rule)
    weight.step(random(ROWS, COLUMNS, seed=4), 1.0)
    scales_OG = weight.quantized().scales_OG
    assert torch.equal(scales_OG.bfloat16().float(), scales_OG)
    assert not torch.equal(scales_OG, quantized.scales_OG)
