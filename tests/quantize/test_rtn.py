"""Rounding to nearest: within half a step, never a NaN, and row by row."""

import pytest
import torch
from torch import Tensor

from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from llmopt.quantize.weights import QuantizedWeight, spread, stack_rows

SCHEMES = [
    "w2a16",
    "w2a16-channel-asym",
    "w4a16",
    "w4a16-sym",
    "w4a16-g64",
    "w4a16-g128-sym",
    "w4a16-channel",
    "w4a16-channel-sym",
    "w8a16",
    "w8a16-asym",
    "w8a16-channel",
    "w8a8",
]


def random_weight(rows: int = 12, columns: int = 72, seed: int = 0) -> Tensor:
    """72 columns: no group size divides them."""
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def quantize(weight_OI: Tensor, name: str) -> QuantizedWeight:
    return Rtn().quantize(weight_OI, parse_scheme(name))


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_scales_and_zero_points_have_the_shapes_of_the_scheme(name: str) -> None:
    weight = quantize(random_weight(), name)
    groups = -(-72 // (weight.scheme.group_size or 72))
    assert weight.scheme == parse_scheme(name)
    assert (weight.codes_OI.shape, weight.codes_OI.dtype) == ((12, 72), torch.uint8)
    assert (weight.scales_OG.shape, weight.scales_OG.dtype) == ((12, groups), torch.float32)
    assert int(weight.codes_OI.max()) < weight.scheme.levels
    if weight.scheme.symmetric:
        assert weight.zero_points_OG is None
    else:
        assert weight.zero_points_OG is not None
        assert (weight.zero_points_OG.shape, weight.zero_points_OG.dtype) == ((12, groups), torch.uint8)
        assert int(weight.zero_points_OG.max()) < weight.scheme.levels


@pytest.mark.parametrize("name", SCHEMES)
def test_a_weight_that_is_not_clipped_moves_by_half_a_step_at_most(name: str) -> None:
    weight_OI = random_weight()
    weight = quantize(weight_OI, name)
    steps_OI = spread(weight.scales_OG.abs(), weight.scheme.group_size or 72, 72)
    inside = (weight.codes_OI > 0) & (weight.codes_OI < weight.scheme.levels - 1)
    error = (weight.dequantize() - weight_OI).abs()
    assert inside.float().mean() > (0.8 if weight.scheme.bits > 2 else 0.45)
    assert (error <= 0.5001 * steps_OI)[inside].all()


@pytest.mark.parametrize("name", SCHEMES)
def test_the_error_is_that_of_noise_a_step_wide(name: str) -> None:
    """Uniform over a step: its deviation is step / sqrt(12). Where the range is searched, clipping is part of it, and
    of two bits a large one.
    """
    weight_OI, scheme = random_weight(rows=64, columns=256), parse_scheme(name)
    weight = Rtn(clip_steps=1).quantize(weight_OI, scheme)
    steps_OI = spread(weight.scales_OG, scheme.group_size or 256, 256)
    expected = (steps_OI.square().mean() / 12).sqrt() / weight_OI.square().mean().sqrt()
    assert weight.relative_error(weight_OI) == pytest.approx(expected.item(), rel=0.1 if scheme.bits > 2 else 0.4)


@pytest.mark.parametrize("name", ["w4a16", "w4a16-sym"])
def test_searching_the_range_beats_taking_all_of_it(name: str) -> None:
    weight_OI, scheme = random_weight(rows=64, columns=256), parse_scheme(name)
    full = Rtn(clip_steps=1).quantize(weight_OI, scheme).relative_error(weight_OI)
    assert Rtn().quantize(weight_OI, scheme).relative_error(weight_OI) < 0.97 * full


@pytest.mark.parametrize("name", ["w8a16-channel", "w8a16-channel-asym"])
def test_eight_bits_keep_the_full_range(name: str) -> None:
    """Also where so many weights share a scale that clipping the largest of them would pay."""
    weight_OI = torch.rand((1, 60_000), generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    weight_OI[0, 7] = 1.03
    half_a_step = 1.93 / 255 / 2
    assert quantize(weight_OI, name).dequantize()[0, 7].item() == pytest.approx(1.03, abs=half_a_step * 1.001)


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_quantized_in_parts_are_the_rows_quantized_together(name: str) -> None:
    assert Rtn().rows_are_independent
    weight_OI = random_weight(rows=11)
    parts = stack_rows([quantize(part, name) for part in weight_OI.split(4)])
    whole = quantize(weight_OI, name)
    assert torch.equal(parts.codes_OI, whole.codes_OI)
    assert torch.equal(parts.scales_OG, whole.scales_OG)
    if whole.zero_points_OG is not None:
        assert parts.zero_points_OG is not None
        assert torch.equal(parts.zero_points_OG, whole.zero_points_OG)


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zero(name: str) -> None:
    """A row of them, and a few among others: rows are pruned, and weights are."""
    weight_OI = random_weight()
    weight_OI[3] = 0
    weight_OI[:, 7] = 0
    dequantized = quantize(weight_OI, name).dequantize()
    assert not dequantized[3].any()
    assert not dequantized[:, 7].any()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("value", [2.5, -2.5, 1e-3])
def test_a_row_of_equal_weights_is_exact(name: str, value: float) -> None:
    weight_OI = torch.full((2, 96), value)
    torch.testing.assert_close(quantize(weight_OI, name).dequantize(), weight_OI, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("magnitude", [2e38, 1e30, 1e-30, 1e-37, 1e-38, 1e-40, 1e-45])
def test_no_magnitude_gives_anything_that_is_not_a_number(name: str, magnitude: float) -> None:
    """From the largest floats, whose squares are infinite, down to those below the smallest normal one."""
    weight_OI = random_weight().clamp(-1.5, 1.5) * magnitude
    weight = quantize(weight_OI, name)
    assert weight_OI.isfinite().all()
    assert weight.scales_OG.isfinite().all()
    assert (weight.scales_OG != 0).all()
    assert weight.dequantize().isfinite().all()
    if magnitude >= 1e-30:
        assert weight.relative_error(weight_OI) < {2: 0.5, 4: 0.3, 8: 0.02}[weight.scheme.bits]
    else:
        assert (weight.dequantize() - weight_OI).abs().max() <= weight_OI.abs().max()


def test_inputs_are_not_changed() -> None:
    weight_OI = random_weight(columns=64)
    before = weight_OI.clone()
    for name in SCHEMES:
        quantize(weight_OI, name)
    assert torch.equal(weight_OI, before)
