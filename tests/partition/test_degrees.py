"""Over how many devices a model can be cut whose linears have schemes."""

import pytest
import transformers

from llmopt.partition.degrees import legal_degrees, shared_by
from llmopt.quantize.scheme import parse_scheme
from tests.families import COMMON, spec_of

SIX = COMMON | {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 192}


def schemes(spec, scheme):
    return dict.fromkeys((linear.name for linear in spec.linears()), parse_scheme(scheme))


@pytest.fixture
def spec():
    return spec_of(transformers.LlamaConfig(**SIX | {"intermediate_size": 384}))


def test_floats_are_cut_wherever_heads_and_channels_are(spec):
    assert legal_degrees(spec, {}, stored=True) == [1, 2, 3, 6]


@pytest.mark.parametrize(
    ("scheme", "degrees"),
    [
        ("w4a16-g32-sym", [1, 2, 3, 6]),
        ("w8a16-g64-sym", [1, 3]),
        ("w4a16-g128-sym", [1]),
        ("w8a16-channel", [1, 2, 3, 6]),
    ],
)
def test_groups_that_are_stored_are_not_cut(spec, scheme, degrees):
    assert legal_degrees(spec, schemes(spec, scheme), stored=True) == degrees
    assert legal_degrees(spec, schemes(spec, scheme), stored=False) == [1, 2, 3, 6]


def test_the_obstacle_names_the_linear_and_its_groups(spec):
    found = shared_by(spec, schemes(spec, "w8a16-g64-sym"), 2, stored=True)
    assert found.obstacle == (
        "model.layers.0.self_attn.o_proj has 192 inputs in groups of 64, and a device of 2 would get 96 of them, "
        "which is no whole number of groups"
    )
    assert "attention heads do not divide by 4" in shared_by(spec, {}, 4, stored=True).obstacle


@pytest.mark.parametrize("stored", [True, False])
def test_pairs_of_8_bit_codes_are_not_cut(stored):
    spec = spec_of(transformers.LlamaConfig(**SIX | {"intermediate_size": 90}))
    found = shared_by(spec, schemes(spec, "w8a8"), 2, stored=stored)
    assert found.obstacle == "model.layers.0.mlp.down_proj has pairs of 8-bit codes, and 45 of its 90 inputs cut one"
    assert shared_by(spec, schemes(spec, "w8a8"), 3, stored=stored).legal
