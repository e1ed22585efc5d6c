"""Rotations: orthogonal, the same on every run, and kept only where channels stand out."""

import pytest
import torch

from llmopt.quantize.fold import FoldedLinear, InputSample, Turning, best_change, exact_outputs, output_error
from llmopt.quantize.rotate import Rotate, random_rotation
from llmopt.quantize.scheme import parse_scheme

KV_HEADS, GROUP, CHANNELS = 2, 3, 16
HEADS = (KV_HEADS, GROUP)
COLUMNS = KV_HEADS * GROUP * CHANNELS


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(tokens_NI: torch.Tensor) -> InputSample:
    return InputSample(tokens_NI=tokens_NI, largest_I=tokens_NI.abs().amax(0))


def values_with_outliers() -> torch.Tensor:
    """One channel of every head is far larger than the others."""
    by_head = random(64, KV_HEADS * GROUP, CHANNELS, seed=1)
    by_head[..., 5] *= 30
    return by_head.flatten(1)


@pytest.mark.parametrize("size", [1, 2, 16, 64, 24, 80])
def test_they_are_orthogonal(size: int):
    turn_DD = random_rotation(size, torch.Generator().manual_seed(3))
    assert torch.allclose(turn_DD @ turn_DD.T, torch.eye(size), atol=1e-5)


def test_where_a_size_is_a_power_of_two_every_channel_goes_evenly_to_all():
    turn_DD = random_rotation(32, torch.Generator().manual_seed(3))
    assert torch.allclose(turn_DD.abs(), torch.full((32, 32), 32**-0.5))


def test_they_are_the_same_on_every_run_and_differ_from_one_another():
    inputs = sample(values_with_outliers())
    first, again = (list(Rotate().candidates(random(8, COLUMNS), inputs, HEADS)) for _ in range(2))
    assert all(torch.equal(one.turn_DD, other.turn_DD) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0].turn_DD, first[1].turn_DD)


def test_a_turned_linear_computes_the_same_from_turned_values():
    turning = Turning(random_rotation(CHANNELS, torch.Generator().manual_seed(0)))
    weight_OI, values_NI = random(8, COLUMNS), random(5, COLUMNS, seed=1)
    turned_NO = turning.of_inputs(values_NI) @ turning.of_weight(weight_OI).T
    assert torch.allclose(turned_NO, values_NI @ weight_OI.T, atol=1e-4)


def test_rows_and_biases_that_make_values_make_turned_ones():
    turning = Turning(random_rotation(CHANNELS, torch.Generator().manual_seed(0)))
    rows, bias, x_NH = random(KV_HEADS * CHANNELS, 12), random(KV_HEADS * CHANNELS, seed=1), random(5, 12, seed=2)
    turned_NI = x_NH @ turning.of_maker(rows, HEADS).T + turning.of_maker(bias, HEADS)
    assert torch.allclose(turned_NI, turning.of_inputs(x_NH @ rows.T + bias), atol=1e-5)


def test_outliers_cost_less_when_they_are_spread():
    linears = [FoldedLinear(random(24, COLUMNS), parse_scheme("w8a8"))]
    inputs = sample(values_with_outliers())
    best, outputs = best_change(Rotate(), linears, inputs, HEADS), exact_outputs(linears, inputs)
    assert best is not None
    assert 2 * output_error(linears, inputs, best, outputs) < output_error(linears, inputs, None, outputs)


def test_there_is_none_where_the_axes_are_as_good_as_they_can_be():
    """One channel is all there is, and its weights are on the grid as they are."""
    values_NI = torch.zeros(64, COLUMNS)
    values_NI[:, ::CHANNELS] = random(64, KV_HEADS * GROUP, seed=1)
    weight_OI = torch.zeros(24, COLUMNS)
    weight_OI[:, ::CHANNELS] = random(24, KV_HEADS * GROUP)
    linears = [FoldedLinear(weight_OI, parse_scheme("w4a16-g32"))]
    assert best_change(Rotate(), linears, sample(values_NI), HEADS) is None


def test_only_values_of_heads_are_turned():
    assert not list(Rotate().candidates(random(8, COLUMNS), sample(values_with_outliers()), None))
