"""Fake quantization, against finite differences, autograd and what is stored."""

import pytest
import torch
from torch import Tensor

from llmopt.quantize import fake as fake_module
from llmopt.quantize.fake import FakeQuantizedWeight, straight_through, within_cell
from llmopt.quantize.gptq import Gptq
from llmopt.quantize.grid import HALF_SCALE, ScaleRule
from llmopt.quantize.int8 import sums_fit
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from tests.quantize.test_gptq import COLUMNS, ROWS, correlated_inputs, random, statistics

SCHEMES = [
    "w2a16",
    "w2a16-channel-asym",
    "w4a16",
    "w4a16-sym",
    "w4a16-channel-sym",
    "w4a16-g64",
    "w8a16",
    "w8a16-asym",
    "w8a8",
]


def fake(scheme: str, rule: ScaleRule = HALF_SCALE, rank: int | None = None) -> FakeQuantizedWeight:
    weight_OI = random(ROWS, COLUMNS)
    quantized = Gptq(scales=rule).quantize(weight_OI, parse_scheme(scheme), statistics(correlated_inputs()))
    return FakeQuantizedWeight(quantized, weight_OI, rule, rank, torch.Generator().manual_seed(0))


def moved(weight: FakeQuantizedWeight, rate: float = 0.1, steps: int = 5) -> FakeQuantizedWeight:
    """After some steps of Adam towards something else."""
    adam = torch.optim.Adam(weight.parameters(), lr=rate)
    for seed in range(steps):
        adam.zero_grad()
        (weight() - random(ROWS, COLUMNS, seed=seed)).square().sum().backward()
        adam.step()
    return weight


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_begins_as_what_it_was_made_from(scheme: str):
    weight = fake(scheme)
    assert torch.equal(weight(), weight.weight.dequantize())
    assert torch.equal(weight.quantized().codes_OI, weight.weight.codes_OI)


def test_what_a_method_moved_to_another_code_starts_as_far_within_that_as_it_lay_beyond():
    offsets = torch.tensor([0.0, 0.2, -0.3, 0.5, 0.6, -0.9, 1.0, -7.0])
    expected = torch.tensor([0.0, 0.2, -0.3, 0.499, 0.4, -0.1, 0.0, 0.0])
    assert torch.allclose(within_cell(offsets), expected)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_trained_is_what_ships(scheme: str, rank: int | None):
    weight = moved(fake(scheme, rank=rank))
    stored = weight.quantized()
    assert not torch.equal(stored.codes_OI, weight.weight.codes_OI)
    assert torch.equal(weight(), stored.dequantize())
    assert torch.equal(stored.scales_OG.half().float(), stored.scales_OG)
    assert scheme != "w8a8" or sums_fit(stored.codes_OI)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_some_rows_at_a_time_are_all_rows_at_once(scheme: str, monkeypatch: pytest.MonkeyPatch):
    whole, upstream_OI = moved(fake(scheme)), random(ROWS, COLUMNS, seed=3)
    found = []
    for weights in (2**20, 3 * COLUMNS):
        monkeypatch.setattr(fake_module, "CACHED_WEIGHTS", weights)
        whole.zero_grad()
        dense_OI = whole()
        (dense_OI * upstream_OI).sum().backward()
        found.append((dense_OI.detach(), whole.latent_OGS.grad, whole.ratio_OG1.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-sym", "w4a16-channel-sym", "w8a16"])
def test_the_gradient_of_a_step_size_is_the_finite_difference_with_the_rounding_held(scheme: str):
    """With the rounding error of each weight held, ŵ(s) = w + s·(round(w/s₀) - w/s₀), or s times the outermost code."""
    weight = fake(scheme, ScaleRule())
    with torch.no_grad():
        weight.latent_OGS.mul_(1.3)  # so that some are clipped
    upstream_OI = random(ROWS, COLUMNS, seed=3)
    (weight() * upstream_OI).sum().backward()
    start = weight.start_OG1.double()
    latent, codes = weight.latent_OGS.detach().double(), weight.codes(weight.latent_OGS.detach().clone()).double()
    clipped = codes != latent.round()
    assert 0 < int(clipped.sum()) < clipped.numel() / 2
    held = codes - latent

    def loss(ratio: float) -> Tensor:
        step = start * ratio
        dense = torch.where(clipped, step * codes, latent * start + step * held)
        upstream = weight._grouped(upstream_OI).double()
        return (dense * upstream).sum(-1, keepdim=True)

    difference = (loss(1 + 1e-4) - loss(1 - 1e-4)) / 2e-4
    size, largest = latent.shape[-1], 2 ** (weight.weight.scheme.bits - 1) - 1
    expected = difference / (size * largest) ** 0.5
    assert torch.allclose(weight.ratio_OG1.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_latent_passes_through_the_rounding_unless_it_was_clipped():
    weight = fake("w4a16-sym")
    with torch.no_grad():
        weight.latent_OGS[0] = 20.0
    upstream_OI = random(ROWS, COLUMNS, seed=3)
    (weight() * upstream_OI).sum().backward()
    through = weight._grouped(upstream_OI) * weight.start_OG1
    assert torch.equal(weight.latent_OGS.grad[1:], through[1:])
    assert not weight.latent_OGS.grad[0].any()


def test_thin_matrices_move_the_latents_and_start_from_nothing():
    weight = fake("w4a16", rank=4)
    assert {name for name, _ in weight.named_parameters()} == {"ratio_OG1", "read_RI", "write_OR"}
    moved(weight)
    change = (weight.latent() - weight.base_OGS).flatten(1)
    assert torch.linalg.matrix_rank(change) == 4


def test_without_the_float_weight_latents_start_at_the_codes():
    quantized = Rtn().quantize(random(ROWS, COLUMNS), parse_scheme("w4a16"))
    weight = FakeQuantizedWeight(quantized)
    assert torch.equal(weight.latent_OGS, weight.latent_OGS.round())
    assert torch.equal(weight(), quantized.dequantize())


def test_learning_brings_a_rounded_weight_nearer_to_what_its_outputs_should_be():
    weight_OI, x = random(ROWS, COLUMNS), correlated_inputs()
    quantized = Rtn().quantize(weight_OI, parse_scheme("w4a16"))
    weight = FakeQuantizedWeight(quantized, weight_OI)
    adam = torch.optim.Adam(weight.parameters(), lr=0.005)

    def error() -> Tensor:
        return ((weight() - weight_OI) @ x.T).square().sum()

    before = float(error().detach())
    for _ in range(100):
        adam.zero_grad()
        error().backward()
        adam.step()
    assert float(error().detach()) < 0.7 * before


def test_activations_are_rounded_with_the_gradient_of_those_that_are_not():
    x = random(3, 4).requires_grad_()
    rounded = straight_through(x, x.round())
    rounded.sum().backward()
    assert torch.allclose(rounded, x.round())
    assert torch.equal(x.grad, torch.ones(3, 4))
