"""The reference for quantized products: weights as dequantized, activations rounded token by token."""

import pytest
import torch
from torch import Tensor

from llmopt.model.spec import Linear
from llmopt.quantize.execute import quantized_apply, round_rows
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme

LINEAR = Linear(name="up", out_features=8, in_features=40)
BIASED = Linear(name="up", out_features=8, in_features=40, bias=True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded_slowly(row: list[float]) -> list[float]:
    low, high = min(row), max(row)
    step = (high - low) / 255
    return [low + round((value - low) / step) * step for value in row]


def test_a_row_lies_on_256_points_from_its_lowest_to_its_highest_value() -> None:
    x = random(2, 5, 40)
    rounded = round_rows(x)
    for batch in range(2):
        for token in range(5):
            expected = rounded_slowly(x[batch, token].tolist())
            assert rounded[batch, token].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_ends_of_a_row_are_exact_and_nothing_moves_by_more_than_half_a_step() -> None:
    x = random(6, 40)
    rounded, step = round_rows(x), (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 255
    torch.testing.assert_close(rounded.amin(-1), x.amin(-1))
    torch.testing.assert_close(rounded.amax(-1), x.amax(-1))
    assert ((rounded - x).abs() <= 0.501 * step).all()
    assert (rounded != x).float().mean() > 0.9


def test_an_outlier_costs_its_own_row_only() -> None:
    x = random(6, 40)
    spoiled = x.clone()
    spoiled[2, 7] = 1e4
    others = [0, 1, 3, 4, 5]
    assert torch.equal(round_rows(spoiled)[others], round_rows(x)[others])


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-20])
def test_a_row_of_equal_values_stays(value: float) -> None:
    x = torch.full((2, 40), value)
    assert torch.equal(round_rows(x), x)


def test_the_input_is_not_changed() -> None:
    x = random(3, 40)
    before = x.clone()
    round_rows(x)
    assert torch.equal(x, before)


def test_a_float_weight_is_multiplied_as_it_is() -> None:
    x, weights = random(3, 40), {"up.weight": random(8, 40, seed=1), "up.bias": random(8, seed=2)}
    product = x @ weights["up.weight"].T
    torch.testing.assert_close(quantized_apply(weights, LINEAR, x), product)
    torch.testing.assert_close(quantized_apply(weights, BIASED, x), product + weights["up.bias"])


@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_a_weight_only_scheme_leaves_activations_alone(name: str) -> None:
    x, weight = random(3, 40), Rtn().quantize(random(8, 40, seed=1), parse_scheme(name))
    weights = {"up.weight": weight, "up.bias": random(8, seed=2)}
    expected = x @ weight.dequantize().T + weights["up.bias"]
    torch.testing.assert_close(quantized_apply(weights, BIASED, x), expected)


def test_eight_bit_activations_are_rounded_unless_they_are_not_to_be() -> None:
    x, weight = random(3, 40), Rtn().quantize(random(8, 40, seed=1), parse_scheme("w8a8"))
    weights, dequantized = {"up.weight": weight}, weight.dequantize()
    torch.testing.assert_close(quantized_apply(weights, LINEAR, x), round_rows(x) @ dequantized.T)
    torch.testing.assert_close(quantized_apply(weights, LINEAR, x, round_activations=False), x @ dequantized.T)


def test_a_tied_head_multiplies_by_the_table() -> None:
    head = Linear(name="lm_head", out_features=8, in_features=40, tied_to="embed")
    x, table = random(3, 40), random(8, 40, seed=1)
    torch.testing.assert_close(quantized_apply({"embed.weight": table}, head, x), x @ table.T)
