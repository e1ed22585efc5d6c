"""GPTQ against the obvious way to do it, and against what it promises."""

import pytest
import torch
from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.quantize.gptq import Gptq, inverse_factor, inverse_of_upper
from llmopt.quantize.int8 import LARGEST_SUM, sums_fit
from llmopt.quantize.method import InputStatistics
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from llmopt.quantize.search import Search
from llmopt.quantize.weights import QuantizedWeight, spread

SCHEMES = ["w2a16", "w2a16-asym", "w4a16", "w4a16-sym", "w4a16-channel-sym", "w4a16-g64", "w8a16", "w8a8"]
ROWS, COLUMNS = 12, 72


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(tokens: int = 400, columns: int = COLUMNS) -> Tensor:
    """Inputs that say much of one another, of very different sizes."""
    sizes = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
    return (random(tokens, 12, seed=1) @ random(12, columns, seed=2) + 0.3 * random(tokens, columns, seed=4)) * sizes


def statistics(inputs_TI: Tensor) -> InputStatistics:
    return InputStatistics(tokens=len(inputs_TI), second_moment_II=inputs_TI.T @ inputs_TI / len(inputs_TI))


def output_error(weight_OI: Tensor, quantized: QuantizedWeight, inputs_TI: Tensor) -> float:
    return float((inputs_TI @ (weight_OI - quantized.dequantize()).T).square().mean())


def obvious(weight_OI: Tensor, inputs: InputStatistics, quantized: QuantizedWeight, damping: float) -> Tensor:
    """Codes by the formula of Optimal Brain Surgeon, with the inverse of what is left computed anew for each column.

    On the grid of `quantized`, in the same order.
    """
    moment = inputs.second_moment_II.double()
    moment = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    weight, codes = weight_OI.double().clone(), torch.zeros_like(weight_OI, dtype=torch.int16)
    size = quantized.scheme.group_size or weight.shape[1]
    scales = spread(quantized.scales_OG, size, weight.shape[1]).double()
    zeros = torch.full_like(scales, 2 ** (quantized.scheme.bits - 1))
    if quantized.zero_points_OG is not None:
        zeros = spread(quantized.zero_points_OG, size, weight.shape[1]).double()
    left = torch.argsort(inputs.second_moment_II.diagonal(), descending=True, stable=True).tolist()
    int8 = quantized.scheme.activation_bits == 8
    while left:
        column, *left = left
        code = (weight[:, column] / scales[:, column]).round() + zeros[:, column]
        code = code.clamp(0, quantized.scheme.levels - 1)
        if int8 and (neighbour := column ^ 1) not in left and neighbour < weight.shape[1]:
            other = codes[:, neighbour].double() - 128
            code = torch.minimum(code, 256 - other.clamp_min(0)).maximum(0 - other.clamp_max(0))
        codes[:, column] = code.to(torch.int16)
        error = weight[:, column] - (code - zeros[:, column]) * scales[:, column]
        if left:
            here = [column, *left]
            inverse = torch.linalg.inv(moment[here][:, here])
            weight[:, left] -= error[:, None] * inverse[0, 1:] / inverse[0, 0]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("block_columns", [1, 7, 128])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_codes_are_those_of_the_obvious_way(name: str, block_columns: int) -> None:
    weight, inputs = random(ROWS, COLUMNS), statistics(correlated_inputs())
    quantized = Gptq(block_columns=block_columns).quantize(weight, parse_scheme(name), inputs)
    expected = obvious(weight, inputs, quantized, Gptq().damping)
    # Sums in another order and another precision: now and then a value halfway falls the other way, and all behind it.
    assert (quantized.codes_OI == expected).float().mean() > 0.97


@pytest.mark.parametrize("name", SCHEMES)
def test_outputs_err_less_than_with_rounding_to_nearest(name: str) -> None:
    weight, x = random(ROWS, COLUMNS), correlated_inputs()
    scheme, inputs = parse_scheme(name), statistics(x)
    gptq = output_error(weight, Gptq().quantize(weight, scheme, inputs), x)
    assert gptq < 0.6 * output_error(weight, Rtn().quantize(weight, scheme), x)


@pytest.mark.parametrize("name", ["w4a16", "w4a16-sym", "w4a16-channel-sym"])
def test_a_grid_that_suits_the_inputs_errs_less_than_one_that_suits_the_weights(name: str) -> None:
    """With inputs that are not correlated, which is what the search supposes."""
    weight, x = random(64, COLUMNS), random(4000, COLUMNS, seed=5) * torch.logspace(-1, 1, COLUMNS)
    scheme = parse_scheme(name)
    search = output_error(weight, Search().quantize(weight, scheme, statistics(x)), x)
    assert search < 0.95 * output_error(weight, Rtn().quantize(weight, scheme), x)


@pytest.mark.parametrize("columns", [72, 33])
def test_int8_codes_do_not_saturate_whatever_the_order(columns: int) -> None:
    weight = random(ROWS, columns) + 2  # neighbours of one sign everywhere
    quantized = Gptq().quantize(weight, parse_scheme("w8a8"), statistics(correlated_inputs(columns=columns)))
    assert sums_fit(quantized.codes_OI)
    assert int((quantized.codes_OI.int() - 128).abs().max()) > LARGEST_SUM // 2 - 4


def test_a_channel_that_is_always_0_is_rounded_like_any_weight_and_moves_no_other() -> None:
    weight, x = random(ROWS, COLUMNS), correlated_inputs()
    x[:, 5] = 0
    scheme = parse_scheme("w4a16-sym")
    quantized = Gptq().quantize(weight, scheme, statistics(x))
    steps = spread(quantized.scales_OG.abs(), 32, COLUMNS)
    inside = (quantized.codes_OI > 0) & (quantized.codes_OI < 15)
    assert ((quantized.dequantize() - weight).abs() <= 0.5001 * steps)[:, 5][inside[:, 5]].all()
    spoiled = weight.clone()
    spoiled[:, 5] = weight[:, 5].flip(0).clamp(-0.1, 0.1)
    assert torch.equal(Gptq().quantize(spoiled, scheme, statistics(x)).codes_OI[:, 64:], quantized.codes_OI[:, 64:])


def test_inputs_that_are_all_0_leave_rounding() -> None:
    weight, nothing = random(ROWS, COLUMNS), statistics(torch.zeros(100, COLUMNS))
    scheme = parse_scheme("w8a16")
    assert torch.equal(Gptq().quantize(weight, scheme, nothing).codes_OI, Rtn().quantize(weight, scheme).codes_OI)


def test_repeated_tokens_need_no_more_than_damping() -> None:
    """One token over and over: H has rank 1."""
    weight, x = random(ROWS, COLUMNS), random(1, COLUMNS).repeat(500, 1)
    quantized = Gptq().quantize(weight, parse_scheme("w4a16"), statistics(x))
    assert output_error(weight, quantized, x) < 0.1 * output_error(weight, Rtn().quantize(weight, quantized.scheme), x)


def test_damping_grows_until_the_moment_is_positive_definite() -> None:
    moment = torch.eye(4)
    moment[0, 1] = moment[1, 0] = 1.5  # eigenvalues 2.5 and -0.5
    factor = inverse_factor(moment, 0.01)
    damped = torch.linalg.inv(factor.T.double() @ factor.double())
    torch.testing.assert_close(damped, moment.double() + torch.eye(4, dtype=torch.float64), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("broken", [-torch.eye(4), torch.full((4, 4), torch.nan)])
def test_what_is_no_second_moment_is_refused(broken: Tensor) -> None:
    with pytest.raises(LlmoptError, match=r"positive definite|not finite"):
        inverse_factor(broken * 100, 0.01)


def test_nothing_that_is_given_is_changed() -> None:
    weight, inputs = random(ROWS, COLUMNS), statistics(correlated_inputs())
    before = weight.clone(), inputs.second_moment_II.clone()
    Gptq().quantize(weight, parse_scheme("w4a16"), inputs)
    assert torch.equal(weight, before[0])
    assert torch.equal(inputs.second_moment_II, before[1])


@pytest.mark.parametrize("size", [1, 127, 128, 333])
def test_a_triangle_is_inverted_by_halves(size):
    upper = torch.randn((size, size), generator=torch.Generator().manual_seed(0), dtype=torch.float64).triu()
    upper.diagonal().add_(torch.full((size,), 30.0, dtype=torch.float64))
    inverse = inverse_of_upper(upper)
    assert torch.equal(inverse, inverse.triu())
    torch.testing.assert_close(inverse @ upper, torch.eye(size, dtype=torch.float64))
