"""A quantized weight stands for (code - zero point) * scale, group by group."""

import pytest
import torch

from llmopt.quantize.scheme import parse_scheme
from llmopt.quantize.weights import QuantizedWeight, split_rows, stack_rows

SCHEMES = ["w2a16", "w2a16-asym", "w4a16", "w4a16-sym", "w4a16-channel", "w8a16", "w8a16-g32-asym", "w8a8"]


def random_weight(scheme_name: str, rows: int = 5, columns: int = 72, seed: int = 0) -> QuantizedWeight:
    scheme, generator = parse_scheme(scheme_name), torch.Generator().manual_seed(seed)
    groups = -(-columns // (scheme.group_size or columns))
    zeros = torch.randint(scheme.levels, (rows, groups), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(
        scheme=scheme,
        codes_OI=torch.randint(scheme.levels, (rows, columns), generator=generator, dtype=torch.uint8),
        scales_OG=torch.randn((rows, groups), generator=generator),
        zero_points_OG=None if scheme.symmetric else zeros,
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_every_code_is_dequantized_by_its_own_group(name: str) -> None:
    weight = random_weight(name)
    dequantized = weight.dequantize()
    assert dequantized.dtype == torch.float32
    size = weight.scheme.group_size or 72
    for row in range(5):
        for column in range(72):
            zero = 2 ** (weight.scheme.bits - 1)
            if weight.zero_points_OG is not None:
                zero = int(weight.zero_points_OG[row, column // size])
            code, scale = int(weight.codes_OI[row, column]), float(weight.scales_OG[row, column // size])
            assert dequantized[row, column].item() == pytest.approx((code - zero) * scale, rel=1e-6)


def test_the_relative_error_is_that_of_the_whole_matrix() -> None:
    weight = random_weight("w8a16")
    exact = weight.dequantize()
    assert weight.relative_error(exact) == 0.0
    assert weight.relative_error(2 * exact) == pytest.approx(0.5)
    off = exact.clone()
    off[0, 0] += 3.0
    assert weight.relative_error(off) == pytest.approx(3.0 / off.norm().item(), rel=1e-5)


def test_zeros_that_are_kept_have_no_error() -> None:
    weight = random_weight("w8a16")
    weight = QuantizedWeight(
        scheme=weight.scheme,
        codes_OI=torch.full_like(weight.codes_OI, 128),
        scales_OG=weight.scales_OG,
        zero_points_OG=None,
    )
    assert weight.relative_error(torch.zeros(5, 72)) == 0.0


@pytest.mark.parametrize("name", SCHEMES)
def test_stacked_rows_stand_for_the_rows_above_one_another(name: str) -> None:
    upper, lower = random_weight(name), random_weight(name, rows=3, seed=1)
    stacked = stack_rows([upper, lower])
    assert stacked.scheme == upper.scheme
    assert torch.equal(stacked.dequantize(), torch.cat([upper.dequantize(), lower.dequantize()]))


@pytest.mark.parametrize("name", ["w4a16", "w8a16", "w8a8"])
def test_rows_that_were_put_together_come_apart_again(name: str) -> None:
    parts = [random_weight(name, rows, seed=rows) for rows in (3, 1, 5)]
    for apart, part in zip(split_rows(stack_rows(parts), [3, 1, 5]), parts, strict=True):
        assert torch.equal(apart.codes_OI, part.codes_OI)
        assert torch.equal(apart.dequantize(), part.dequantize())
