"""Grids against loops that try every candidate, one weight at a time."""

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from llmopt.quantize.grid import (
    asymmetric_grid,
    find_grid,
    grouped,
    least_error,
    quantize_to,
    round_to_codes,
    shrinks_to_try,
    symmetric_scales,
    without_dead_outliers,
)
from llmopt.quantize.scheme import parse_scheme

SHRINKS = [1 - 0.3 * step / 8 for step in range(8)]


@dataclass(frozen=True)
class Point:
    """One candidate for one group, and what it leaves: all in Python's floats."""

    scale: float
    zero: int
    codes: tuple[int, ...]
    error: float


def rounded(group: list[float], scale: float, zero: int, levels: int) -> Point:
    codes = tuple(min(max(round(weight / scale) + zero, 0), levels - 1) for weight in group)
    error = sum((weight - (code - zero) * scale) ** 2 for weight, code in zip(group, codes, strict=True))
    return Point(scale, zero, codes, error)


def best_symmetric(group: list[float], bits: int, divisors: Iterable[float]) -> Point:
    largest = max(group, key=abs)
    points = [rounded(group, -largest / divisor, 2 ** (bits - 1), 2**bits) for divisor in divisors]
    return min(points, key=lambda point: point.error)


def best_asymmetric(group: list[float], bits: int, shrinks: Iterable[float]) -> Point:
    low, high, top = min(*group, 0.0), max(*group, 0.0), 2**bits - 1
    points = []
    for shrink in shrinks:
        scale = (high - low) * shrink / top
        points.append(rounded(group, scale, min(max(round(-low * shrink / scale), 0), top), top + 1))
    return min(points, key=lambda point: point.error)


def random_groups(rows: int = 6, groups: int = 5, size: int = 32, *, seed: int = 0) -> Tensor:
    """Heavy tails, so that clipping pays for some groups and not for others; some rows off centre."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((rows, groups, size), generator=generator)
    values *= torch.randn((rows, groups, size), generator=generator).abs() ** 0.5
    return values + torch.linspace(-1, 1, rows)[:, None, None]


def test_groups_are_cut_from_each_row_and_the_last_is_filled_with_zeros() -> None:
    weight_OI = torch.arange(1.0, 11.0).reshape(2, 5)
    assert grouped(weight_OI, 2).tolist() == [[[1, 2], [3, 4], [5, 0]], [[6, 7], [8, 9], [10, 0]]]
    assert grouped(weight_OI, None).tolist() == [[[1, 2, 3, 4, 5]], [[6, 7, 8, 9, 10]]]


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_scales_are_the_best_that_trying_all_finds(bits: int) -> None:
    groups_OGS = random_groups()
    divisors = [2 ** (bits - 1) / shrink for shrink in SHRINKS]
    scales_OG = symmetric_scales(groups_OGS, bits, divisors)
    chosen = set()
    for row, group in torch.cartesian_prod(torch.arange(6), torch.arange(5)).tolist():
        best = best_symmetric(groups_OGS[row, group].tolist(), bits, divisors)
        assert scales_OG[row, group].item() == pytest.approx(best.scale, rel=1e-6)
        chosen.add(round(abs(best.scale) / groups_OGS[row, group].abs().max().item(), 6))
    assert len(chosen) > 1 or bits == 8  # the search does choose, where it has something to gain


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_grids_are_the_best_that_trying_all_finds(bits: int) -> None:
    groups_OGS = random_groups()
    scales_OG, zeros_OG = asymmetric_grid(groups_OGS, bits, SHRINKS)
    for row, group in torch.cartesian_prod(torch.arange(6), torch.arange(5)).tolist():
        best = best_asymmetric(groups_OGS[row, group].tolist(), bits, SHRINKS)
        assert scales_OG[row, group].item() == pytest.approx(best.scale, rel=1e-6)
        assert zeros_OG[row, group].item() == best.zero


def test_the_first_of_equal_candidates_wins() -> None:
    groups_OGS = torch.tensor([[[1.0, -2.0, 4.0]]])
    exact = [(torch.tensor([[scale]]), torch.tensor([[8.0]])) for scale in (0.3, 1.0, 0.5)]
    scales_OG, zeros_OG = least_error(groups_OGS, [*exact, (torch.tensor([[1.0]]), torch.tensor([[4.0]]))], 16)
    assert (scales_OG.item(), zeros_OG.item()) == (1.0, 8.0)


def test_each_group_chooses_for_itself() -> None:
    groups_OGS = torch.tensor([[[1.0, 3.0], [0.5, 1.5]]])
    candidates = [(torch.tensor([[scale, scale]]), torch.tensor([[8.0, 8.0]])) for scale in (1.0, 0.5)]
    assert least_error(groups_OGS, candidates, 16)[0].tolist() == [[1.0, 0.5]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_weight_lies_on_the_outermost_code_whatever_its_sign(bits: int, sign: float) -> None:
    half = 2 ** (bits - 1)
    groups_OGS = sign * torch.tensor([[[7.0, -3.0, 1.0, 0.0]]])
    scales_OG = symmetric_scales(groups_OGS, bits, [float(half)])
    codes = round_to_codes(groups_OGS, scales_OG[..., None], float(half), 2**bits)
    assert codes[0, 0, 0] == 0
    assert (codes[0, 0, 0] - half) * scales_OG.item() == sign * 7.0
    assert codes[0, 0, 3] == half


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shift", [-5.0, -0.3, 0.0, 0.3, 5.0])
def test_zero_is_on_every_asymmetric_grid(bits: int, shift: float) -> None:
    """Also where all weights of a group lie on one side of it."""
    groups_OGS = random_groups(seed=3) + shift
    scales_OG, zeros_OG = asymmetric_grid(groups_OGS, bits, SHRINKS)
    assert torch.equal(zeros_OG, zeros_OG.round())
    assert zeros_OG.min() >= 0
    assert zeros_OG.max() <= 2**bits - 1
    codes = round_to_codes(torch.zeros_like(groups_OGS), scales_OG[..., None], zeros_OG[..., None], 2**bits)
    assert torch.equal(codes, zeros_OG[..., None].expand_as(codes))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_finer_grid_never_fits_worse(symmetric: bool) -> None:
    """Candidates that include the full range are at least as good as the full range alone."""
    groups_OGS = random_groups(seed=5)

    def error(shrinks: list[float]) -> Tensor:
        if symmetric:
            scales = symmetric_scales(groups_OGS, 4, [8 / shrink for shrink in shrinks])
            zeros = torch.full_like(scales, 8.0)
        else:
            scales, zeros = asymmetric_grid(groups_OGS, 4, shrinks)
        codes = round_to_codes(groups_OGS, scales[..., None], zeros[..., None], 16)
        return ((codes - zeros[..., None]) * scales[..., None] - groups_OGS).square().sum(-1)

    searched, full = error(SHRINKS), error([1.0])
    assert (searched <= full * (1 + 1e-6)).all()
    assert (searched < 0.9 * full).any()


def test_weights_go_to_the_nearest_point_of_the_given_grid() -> None:
    scheme = parse_scheme("w4a16-g32")
    scales_OG, zeros_OG = torch.tensor([[0.5, 0.25]]), torch.tensor([[3, 15]], dtype=torch.uint8)
    weight_OI = torch.zeros(1, 40)
    weight_OI[0, :5] = torch.tensor([-1.5, 0.3, 0.2, 6.0, 100.0])
    weight_OI[0, 32:35] = torch.tensor([-3.75, 1.0, -0.3])
    weight = quantize_to(weight_OI, scheme, scales_OG, zeros_OG)
    assert weight.codes_OI.dtype == torch.uint8
    assert weight.codes_OI.is_contiguous()
    assert weight.codes_OI.shape == (1, 40)
    assert weight.codes_OI[0, :5].tolist() == [0, 4, 3, 15, 15]
    assert weight.codes_OI[0, 32:35].tolist() == [0, 15, 14]
    assert weight.dequantize()[0, [0, 1, 2, 3, 32, 33, 34]].tolist() == [-1.5, 0.5, 0.0, 6.0, -3.75, 0.0, -0.25]


def test_large_weights_of_dead_inputs_are_no_larger_than_the_others_of_their_group() -> None:
    weight_OI = torch.tensor([[1.0, 90.0, -2.0, -90.0, 0.5], [3.0, 1.0, 4.0, 1.0, 5.0]])
    importance_I = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    expected_OI = torch.tensor([[1.0, 1.0, -2.0, -2.0, 0.5], [3.0, 1.0, 4.0, 1.0, 5.0]])
    assert torch.equal(without_dead_outliers(weight_OI, importance_I, 2), expected_OI)
    assert torch.equal(without_dead_outliers(weight_OI, torch.zeros(5), None), weight_OI)
    assert without_dead_outliers(weight_OI, torch.ones(5), 2) is weight_OI


@pytest.mark.parametrize("name", ["w2a16-channel", "w2a16-channel-asym"])
def test_of_two_bits_the_best_range_of_a_long_row_is_less_than_half_of_it(name: str) -> None:
    """A Gaussian's best four levels are a deviation apart (Max 1960); 4,096 weights reach 3.5 deviations."""
    scheme = parse_scheme(name)
    weight_OI = torch.randn((8, 4096), generator=torch.Generator().manual_seed(0))
    shrinks = shrinks_to_try(scheme, clip_range=0.5, steps=16)
    assert (shrinks[0], len(shrinks)) == (1.0, 24)
    scales_OG, _ = find_grid(weight_OI, scheme, shrinks)
    assert float(scales_OG.abs().mean()) == pytest.approx(1.0, abs=0.1)
    assert shrinks_to_try(parse_scheme("w4a16"), clip_range=0.5, steps=2) == [1.0, 0.75]
