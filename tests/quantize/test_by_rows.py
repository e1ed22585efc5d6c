"""Rounding some rows at a time gives what rounding all at once gives."""

import pytest
import torch

from llmopt.quantize import by_rows
from llmopt.quantize.by_rows import round_in_place, rounded
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme


@pytest.mark.parametrize("name", ["w8a8", "w8a16", "w4a16-g32-asym"])
def test_some_rows_at_a_time_are_all_at_once(name, monkeypatch):
    monkeypatch.setattr(by_rows, "_AT_ONCE", 3 * 64)
    weight_OI = torch.randn(11, 64, generator=torch.Generator().manual_seed(0))
    whole, found = Rtn().quantize(weight_OI, parse_scheme(name)), rounded(weight_OI, parse_scheme(name))
    assert torch.equal(found.codes_OI, whole.codes_OI)
    assert torch.equal(found.scales_OG, whole.scales_OG)
    assert torch.equal(round_in_place(weight_OI.clone(), parse_scheme(name)), whole.dequantize())
