"""Of several methods the one that is best on what none was fitted to."""

import pytest
import torch
from torch import Tensor

from llmopt.quantize.auto import Auto, output_square
from llmopt.quantize.gptq import Gptq
from llmopt.quantize.method import InputStatistics
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from llmopt.quantize.search import Search
from llmopt.quantize.weights import QuantizedWeight
from tests.quantize.test_gptq import COLUMNS, ROWS, correlated_inputs, random


def moment(inputs_TI: Tensor) -> Tensor:
    return inputs_TI.T @ inputs_TI / len(inputs_TI)


def chosen(fitted_TI: Tensor, held_out_TI: Tensor, scheme: str = "w4a16") -> tuple[QuantizedWeight, dict[str, float]]:
    """What auto makes of a weight; and what each candidate errs in the outputs of held-out tokens, the long way."""
    weight_OI, parsed = random(ROWS, COLUMNS, seed=7), parse_scheme(scheme)
    inputs = InputStatistics(tokens=len(fitted_TI), second_moment_II=moment(fitted_TI), held_out_II=moment(held_out_TI))
    found = {method.name: method.quantize(weight_OI, parsed, inputs) for method in (Rtn(), Search(), Gptq())}
    errors = {}
    for name, quantized in found.items():
        outputs = [(weight_OI - quantized.dequantize()) @ x for x in held_out_TI]
        errors[name] = sum(float(y @ y) for y in outputs) / len(outputs)
    best = Auto().quantize(weight_OI, parsed, inputs)
    assert torch.equal(best.codes_OI, found[min(errors, key=errors.__getitem__)].codes_OI)
    return best, errors


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-channel-sym", "w8a16", "w8a8"])
def test_where_inputs_say_much_of_one_another_it_is_gptq(scheme: str) -> None:
    x = correlated_inputs(tokens=800)
    _, errors = chosen(x[:700], x[700:], scheme)
    assert min(errors, key=errors.__getitem__) == "gptq"


def test_what_was_fitted_to_a_few_tokens_that_others_are_not_like_is_not_taken() -> None:
    _, errors = chosen(random(6, COLUMNS, seed=1), random(500, COLUMNS, seed=2))
    assert errors["gptq"] > 1.5 * min(errors["rtn"], errors["search"])


def test_where_inputs_differ_in_size_and_do_not_go_together_it_is_the_search() -> None:
    x = random(4000, COLUMNS, seed=5) * torch.logspace(-1, 1, COLUMNS)
    _, errors = chosen(x[:40], x[40:])
    assert min(errors, key=errors.__getitem__) == "search"


def test_an_output_square_is_the_mean_over_tokens() -> None:
    weight_OI, x_TI = random(3, 8), random(20, 8, seed=1)
    expected = sum(float((weight_OI @ x).square().sum()) for x in x_TI) / 20
    assert output_square(weight_OI, moment(x_TI)) == pytest.approx(expected, rel=1e-5)


def test_an_output_square_is_not_negative() -> None:
    x_1I = torch.tensor([[1.0, 1e-4]])
    noisy_II = moment(x_1I) - 1e-7 * torch.eye(2)
    assert output_square(torch.tensor([[1e-4, -1.0]]), noisy_II) == 0.0
