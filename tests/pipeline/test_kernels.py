"""Which int8 products an artifact is written for, and whether this machine is right about its own."""

import numpy as np
import pytest

from llmopt.artifact import Manifest
from llmopt.artifact.manifest import Source
from llmopt.errors import ArtifactError, UsageError
from llmopt.pipeline import kernels
from llmopt.quantize.assign import Assignment
from llmopt.quantize.scheme import parse_scheme
from tests.onnx_nodes import run_node


def assigned(*schemes: str | None) -> dict[str, Assignment]:
    parsed = [None if scheme is None else parse_scheme(scheme) for scheme in schemes]
    return {str(index): Assignment(name=str(index), scheme=scheme) for index, scheme in enumerate(parsed)}


def manifest(**engine: object) -> Manifest:
    return Manifest(
        source=Source(name="model", revision=None, fingerprint="00"),
        format="onnx",
        scheme="w8a8-channel-sym",
        method="rtn",
        engine=engine,
    )


def test_this_machine_is_said_to_saturate_if_and_only_if_it_does() -> None:
    """Products of neighbouring channels are added in pairs: 2 * 255 * 127 does not fit into 16 bits."""
    x, codes = np.full((4, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    one, zeros = np.float32(1), (np.uint8(0), np.int8(0))
    sums = run_node("MatMulIntegerToFloat", [x, codes, *map(np.array, (one, one, *zeros))])
    assert (sums == 64 * 255 * 127).all() == kernels.sums_in_32_bits()


@pytest.mark.parametrize("exact", [True, False])
def test_auto_is_what_this_machine_does_best(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "sums_in_32_bits", lambda: exact)
    assert [kernels.signed_int8(cpu) for cpu in ("auto", "any", "vnni")] == [exact, False, True]


@pytest.mark.parametrize("word", ["auto", "any", "vnni"])
def test_a_kind_of_cpu_is_one_of_three_words(word: str) -> None:
    assert kernels.parse_cpu(word) == word


def test_any_other_word_is_a_mistake_in_the_command() -> None:
    with pytest.raises(UsageError, match="no CPU kind 'avx'"):
        kernels.parse_cpu("avx")


def test_the_manifest_says_which_kernel_only_where_there_is_one() -> None:
    assert kernels.engine_facts(assigned("w4a16", None), "vnni") == {}
    assert kernels.engine_facts(assigned("w4a16", "w8a8"), "vnni") == {"int8_kernel": "signed"}
    assert kernels.engine_facts(assigned("w8a8"), "any") == {"int8_kernel": "unsigned"}


def test_an_artifact_that_would_saturate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "sums_in_32_bits", lambda: False)
    with pytest.raises(ArtifactError, match="would saturate") as caught:
        kernels.check_runs_here(manifest(int8_kernel="signed"), where="out")
    assert caught.value.where == "out"
    assert caught.value.hint
    for harmless in (manifest(int8_kernel="unsigned"), manifest()):
        kernels.check_runs_here(harmless, where="out")
    monkeypatch.setattr(kernels, "sums_in_32_bits", lambda: True)
    kernels.check_runs_here(manifest(int8_kernel="signed"), where="out")
