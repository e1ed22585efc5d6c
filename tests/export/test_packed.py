"""What a checkpoint of compressed-tensors says of its schemes, and its integers read back, whole and in part."""

from contextlib import ExitStack, closing
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file

from llmopt.errors import LlmoptError
from llmopt.export.checkpoint.compressed_tensors import CompressedTensors, quantization_config
from llmopt.export.checkpoint.config_schemes import config_schemes
from llmopt.export.checkpoint.packed import PackedWeights
from llmopt.model.safetensors_files import read_table
from llmopt.model.spec import Linear
from llmopt.quantize.assign import TableRule, assign
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from tests.families import CASES, spec_of

LINEAR = Linear(name="down", out_features=24, in_features=192)
SPEC = spec_of(CASES["llama"])
SCHEMES = ["w4a16", "w4a16-g64-sym", "w4a16-channel-asym", "w8a16", "w8a16-g32-asym", "w8a16-channel", "w8a8"]


@pytest.fixture
def stored(tmp_path):
    opened = ExitStack()

    def write(scheme, dtype=torch.bfloat16):
        weight_OI = torch.randn((24, 192), generator=torch.Generator().manual_seed(0))
        found = Rtn().quantize(weight_OI, parse_scheme(scheme))
        found = replace(found, scales_OG=found.scales_OG.to(dtype).float())
        save_file(CompressedTensors(dtype).tensors(LINEAR, found), tmp_path / "m.safetensors")
        packed = PackedWeights(read_table(tmp_path / "m.safetensors"), where="here")
        return found, opened.enter_context(closing(packed))

    with opened:
        yield write


def require_equal(found, expected):
    assert found.scheme == expected.scheme
    assert torch.equal(found.codes_OI, expected.codes_OI)
    assert torch.equal(found.scales_OG, expected.scales_OG)
    assert (found.zero_points_OG is None) == (expected.zero_points_OG is None)
    if found.zero_points_OG is not None:
        assert torch.equal(found.zero_points_OG, expected.zero_points_OG)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_was_written_is_read_back(stored, scheme, dtype):
    weight, packed = stored(scheme, dtype)
    packed.require(LINEAR, parse_scheme(scheme))
    require_equal(packed.read_integers(LINEAR, parse_scheme(scheme)), weight)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("at_once", [1 << 24, 400])
def test_a_part_is_that_of_the_whole(stored, monkeypatch, scheme, at_once):
    monkeypatch.setattr("llmopt.export.checkpoint.packed._UNPACKED_AT_ONCE", at_once)
    weight, packed = stored(scheme)
    whole_OI = weight.dequantize()
    some = packed.read_integers(LINEAR, parse_scheme(scheme), rows=((3, 10), (15, 24)))
    assert torch.equal(some.dequantize(), torch.cat([whole_OI[3:10], whole_OI[15:24]]))
    some = packed.read_integers(LINEAR, parse_scheme(scheme), columns=((64, 192),))
    assert torch.equal(some.dequantize(), whole_OI[:, 64:192])


def test_codes_are_those_that_compressed_tensors_unpacks(stored, tmp_path):
    _, packed = stored("w4a16-g64-sym")
    words = load_file(tmp_path / "m.safetensors")["down.weight_packed"]
    signed = unpack_from_int32(words, 4, torch.Size((24, 192)))
    codes_OI = packed.read_integers(LINEAR, parse_scheme("w4a16-g64-sym")).codes_OI
    assert torch.equal(codes_OI.to(torch.int8) - 8, signed)


def said(scheme="w4a16-g32-sym", overrides=(), **changes):
    """What llmopt writes of a scheme, with changes to its first group."""
    rule = TableRule(scheme=None, reason="floats")
    found = quantization_config(SPEC, assign(SPEC, parse_scheme(scheme), overrides, tables=rule))
    for key, value in changes.items():
        *path, last = key.split("__")
        group = found["config_groups"]["group_0"]
        for name in path:
            group = group[name]
        group[last] = value
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_config_says_what_was_asked_for(scheme):
    linears = [linear.name for block in SPEC.blocks for linear in block.linears()]
    found = config_schemes(SPEC, said(scheme), where="c")
    assert found == dict.fromkeys(linears, parse_scheme(scheme))


def test_several_groups_name_their_own():
    found = config_schemes(SPEC, said("w8a16", [("down_proj", parse_scheme("w8a8"))]), where="c")
    assert {name.rpartition(".")[2]: scheme.name for name, scheme in found.items()}["down_proj"] == "w8a8-channel-sym"
    assert found["model.layers.0.mlp.up_proj"].name == "w8a16-g64-sym"


def test_expressions_name_linears_too():
    config = said() | {"ignore": ["re:.*layers\\.0\\..*", "lm_head"]}
    found = config_schemes(SPEC, config, where="c")
    assert {name.split(".")[2] for name in found} == {"1", "2"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_method": "awq"}, "quantized by awq"),
        ({}, "by an unknown method"),
        ({"quant_method": "compressed-tensors"}, "makes no sense: 'config_groups'"),
        ({"quant_method": "compressed-tensors", "config_groups": 3}, "makes no sense"),
        (said() | {"kv_cache_scheme": {"num_bits": 8}}, "has a kv_cache_scheme"),
        (said(weights__type="float"), "weights.type 'float'"),
        (said(weights__actorder="group"), "weights.actorder 'group'"),
        (said(weights__strategy="tensor"), "weights.strategy 'tensor'"),
        (said(weights__group_size=16), "groups have 32, 64, 128"),
        (said(weights__num_bits=3), "no scheme with 3-bit weights"),
        (said(format="marlin-24"), "format 'marlin-24'"),
        (said("w8a8", input_activations__strategy="tensor"), "input_activations.strategy 'tensor'"),
        (said("w8a8", input_activations__dynamic=False), "input_activations.dynamic False"),
        (said(targets=["re:("]), "makes no sense"),
    ],
)
def test_what_llmopt_has_no_word_for_is_refused(config, told):
    with pytest.raises(LlmoptError, match=told):
        config_schemes(SPEC, config, where="c")
