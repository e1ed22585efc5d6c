"""Methods by their names."""

import subprocess
import sys

import pytest
import torch

from llmopt.errors import UsageError
from llmopt.quantize.method import InputStatistics
from llmopt.quantize.registry import METHODS, check_method, find_method
from llmopt.quantize.scheme import parse_scheme

KNOWN = "known here: rtn, search, gptq, reconstruct, auto, awq, rotate, smoothquant, qat"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_found_by_the_name_that_it_goes_by(name: str) -> None:
    check_method(name)
    method = find_method(name)
    assert method.name == ("gptq" if name == "reconstruct" else name)  # a start, from which blocks go on
    assert method.refits_blocks == (name in {"reconstruct", "auto"})
    assert method.rows_are_independent == (not method.candidates)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_quantizes(name: str) -> None:
    weight_OI = torch.randn((8, 64), generator=torch.Generator().manual_seed(0))
    inputs = InputStatistics(tokens=1, second_moment_II=torch.eye(64), held_out_II=torch.eye(64))
    quantized = find_method(name).quantize(weight_OI, parse_scheme("w8a16"), inputs)
    assert quantized.relative_error(weight_OI) < 0.01


@pytest.mark.parametrize(("name", "hint"), [("rtnn", f"did you mean 'rtn'? {KNOWN}"), ("magic", KNOWN)])
@pytest.mark.parametrize("find", [check_method, find_method])
def test_an_unknown_method_is_a_mistake_with_a_hint(find, name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"no method '{name}'") as caught:
        find(name)
    assert caught.value.hint == hint


def test_a_name_is_checked_without_importing_torch() -> None:
    check = "from llmopt.quantize.registry import check_method; check_method('rtn')"
    code = f"import sys; {check}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
