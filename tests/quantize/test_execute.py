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
    low, high = min(*row, 0.0), max(*row, 0.0)
    step = (high - low) / 255
    lowest = round(low / step)
    return [(min(max(round(value / step - lowest), 0), 255) + lowest) * step for value in row]


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_a_row_lies_on_256_points_over_its_range(shift: float) -> None:
    """Zero is in the range, also where all values lie on one side of it."""
    x = random(2, 5, 40) + shift
    rounded = round_rows(x)
    for batch in range(2):
        for token in range(5):
            expected = rounded_slowly(x[batch, token].tolist())
            assert rounded[batch, token].tolist() == pytest.approx(expected, abs=1e-5)
    step = (x.amax(-1, keepdim=True).clamp_min(0) - x.amin(-1, keepdim=True).clamp_max(0)) / 255
    assert ((rounded - x).abs() <= 0.501 * step).all()
    assert (rounded != x).float().mean() > 0.9


def test_256_codes_reach_no_further() -> None:
    """Where both ends lie halfway between two points and fall outwards, one of them has to come back."""
    assert round_rows(torch.tensor([[-127.5, 127.5, 64.0, 0.0]])).tolist() == [[-127.0, 128.0, 64.0, 0.0]]


@pytest.mark.parametrize("shift", [0.0, 0.7, -0.7])
def test_zeros_stay_zero(shift: float) -> None:
    x = random(6, 40) + shift
    x[:, ::3] = 0
    assert not round_rows(x)[:, ::3].any()


def test_an_outlier_costs_its_own_row_only() -> None:
    x = random(6, 40)
    spoiled = x.clone()
    spoiled[2, 7] = 1e4
    others = [0, 1, 3, 4, 5]
    assert torch.equal(round_rows(spoiled)[others], round_rows(x)[others])


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-20])
def test_a_row_of_equal_values_stays(value: float) -> None:
    x = torch.full((2, 40), value)
    torch.testing.assert_close(round_rows(x), x, rtol=1e-6, atol=0)


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
