"""torch's integer kernel computes what the reference says."""

import pytest
import torch

from llmopt.model.spec import Linear
from llmopt.quantize.execute import quantized_apply, round_rows, round_rows_symmetric
from llmopt.quantize.int8 import quantize_rows
from llmopt.quantize.int8_torch import Int8Product, available
from llmopt.quantize.scheme import parse_scheme

pytestmark = pytest.mark.skipif(not available(), reason="this build of torch has no such kernel")


@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 7, 64), (3, 5, 33)])
@pytest.mark.parametrize("offset", [0.0, 3.0, -3.0])
@pytest.mark.parametrize(("symmetric", "rounding"), [(False, round_rows), (True, round_rows_symmetric)])
def test_the_kernel_computes_what_the_reference_does(shape, offset, symmetric, rounding):
    generator = torch.Generator().manual_seed(0)
    linear = Linear(name="layer", out_features=40, in_features=shape[-1])
    weight = quantize_rows(torch.randn(40, shape[-1], generator=generator), parse_scheme("w8a8"))
    x = torch.randn(shape, generator=generator) * 2 + offset
    x[0, 0] = 0  # a row without a range
    expected = quantized_apply({"layer.weight": weight}, linear, x, rounding=rounding)
    torch.testing.assert_close(Int8Product(weight, symmetric=symmetric)(x), expected, atol=1e-3, rtol=1e-5)


def test_a_packed_weight_takes_a_byte_a_weight_and_two_floats_a_row():
    weight = quantize_rows(torch.ones(40, 64), parse_scheme("w8a8"))
    assert Int8Product(weight).nbytes == 40 * 64 + 2 * 40 * 4
