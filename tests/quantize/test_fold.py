"""Folds: changes are chosen by the error of the outputs, and by nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from llmopt.quantize.awq import Awq
from llmopt.quantize.execute import round_rows
from llmopt.quantize.fold import (
    Change,
    Fold,
    FoldedLinear,
    Heads,
    InputSample,
    Scaling,
    best_change,
    exact_outputs,
    output_error,
)
from llmopt.quantize.scheme import parse_scheme
from llmopt.quantize.search import Search
from llmopt.quantize.smoothquant import SmoothQuant

ROWS, COLUMNS, TOKENS = 24, 64, 96


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_with_outliers(size: float = 40.0) -> InputSample:
    """A few inputs are far larger than the rest, as they are behind the norms of language models."""
    tokens_NI = random(TOKENS, COLUMNS, seed=1)
    tokens_NI[:, [3, 17, 40]] *= size
    return InputSample(tokens_NI=tokens_NI, largest_I=tokens_NI.abs().amax(0))


def linear(scheme: str, seed: int = 0) -> FoldedLinear:
    return FoldedLinear(random(ROWS, COLUMNS, seed=seed), parse_scheme(scheme))


@dataclass(frozen=True)
class Given:
    """Candidates that a test names."""

    scales: tuple[Tensor, ...]
    name: str = "given"

    def candidates(self, weight_OI: Tensor, inputs: InputSample, heads: Heads | None) -> Iterator[Scaling]:
        yield from (Scaling.shared(scales_I, heads) for scales_I in self.scales)


def error(linears: list[FoldedLinear], inputs: InputSample, change: Change | None) -> float:
    return output_error(linears, inputs, change, exact_outputs(linears, inputs))


def best_scales(fold: Fold, linears: list[FoldedLinear], inputs: InputSample, heads: Heads | None = None):
    best = best_change(fold, linears, inputs, heads)
    assert best is None or isinstance(best, Scaling)
    return None if best is None else best.scales_I


def test_the_error_is_that_of_the_outputs_of_what_ships():
    one, inputs = linear("w8a8"), inputs_with_outliers()
    scales_I = random(COLUMNS, seed=5).exp()
    quantized = Search().round_to_grid(one.weight_OI * scales_I, one.scheme, torch.ones(COLUMNS))
    shipped_NO = round_rows(inputs.tokens_NI / scales_I) @ quantized.dequantize().T
    expected = (shipped_NO - inputs.tokens_NI @ one.weight_OI.T).double().square().sum()
    assert error([one], inputs, Scaling(scales_I)) == pytest.approx(float(expected), rel=1e-5)


def test_the_candidate_with_the_least_error_over_all_linears_wins():
    linears, inputs = [linear("w8a8"), linear("w8a8", seed=2)], inputs_with_outliers()
    candidates = tuple(random(COLUMNS, seed=seed).mul(0.3).exp() for seed in range(6))
    best = best_scales(Given(candidates), linears, inputs)
    errors = [sum(error([one], inputs, Scaling(scales)) for one in linears) for scales in candidates]
    unfolded = error(linears, inputs, None)
    expected = candidates[errors.index(min(errors))] if min(errors) < unfolded else None
    assert (best is None) == (expected is None)
    assert best is None or torch.equal(best, expected)


def test_there_is_no_fold_where_none_is_better():
    worse = torch.ones(COLUMNS)
    worse[7] = 1e4  # one column takes the whole range of each row's grid
    assert best_scales(Given((worse,)), [linear("w8a8")], inputs_with_outliers()) is None


def test_query_heads_that_read_the_same_values_share_their_scales():
    kv_heads, group, channels = 2, 4, COLUMNS // 8
    scales_I = random(COLUMNS, seed=3).mul(0.01).exp()
    inputs = inputs_with_outliers(1.0)
    best = best_scales(Given((scales_I,)), [linear("w4a16")], inputs, (kv_heads, group))
    shared = scales_I.log().view(kv_heads, group, channels).mean(1).exp()
    expected = shared[:, None].expand(kv_heads, group, channels).reshape(-1)
    unfolded, folded = (error([linear("w4a16")], inputs, change) for change in (None, Scaling(expected)))
    assert (best is not None) == (folded < unfolded)
    assert best is None or torch.allclose(best, expected)


@pytest.mark.parametrize(("fold", "scheme", "gain"), [(SmoothQuant(), "w8a8", 3.0), (Awq(), "w4a16-channel", 1.5)])
def test_outliers_cost_less_with_a_fold(fold: Fold, scheme: str, gain: float):
    one, inputs = linear(scheme), inputs_with_outliers()
    scales_I = best_scales(fold, [one], inputs)
    assert scales_I is not None
    assert error([one], inputs, Scaling(scales_I)) * gain < error([one], inputs, None)


@pytest.mark.parametrize("fold", [SmoothQuant(), Awq()], ids=lambda fold: fold.name)
@pytest.mark.parametrize("dead", ["one input", "all inputs", "one column"])
def test_what_is_dead_has_finite_scales(fold: Fold, dead: str):
    weight_OI, tokens_NI = random(ROWS, COLUMNS), random(TOKENS, COLUMNS, seed=1)
    if dead == "one column":
        weight_OI[:, 5] = 0
    else:
        tokens_NI[:, slice(5, 6) if dead == "one input" else slice(None)] = 0
    sample = InputSample(tokens_NI=tokens_NI, largest_I=tokens_NI.abs().amax(0))
    found = list(fold.candidates(weight_OI, sample, None))
    assert found
    assert all(bool((change.scales_I.isfinite() & (change.scales_I > 0)).all()) for change in found)


def test_smoothquant_balances_the_ranges_at_one_half():
    weight_OI, inputs = random(ROWS, COLUMNS), inputs_with_outliers()
    halfway = list(SmoothQuant(steps=2).candidates(weight_OI, inputs, None))[1].scales_I
    ratio_I = (inputs.largest_I / halfway) / (weight_OI.abs().amax(0) * halfway)
    assert torch.allclose(ratio_I, ratio_I[0].expand_as(ratio_I), rtol=1e-4)
