"""Groups hold every layer once, and what engines fuse together."""

import pytest

from llmopt.model.storage import quantized_bytes
from llmopt.precision.groups import CANDIDATES, fused_groups
from llmopt.quantize.scheme import parse_scheme
from tests.families import CASES, spec_of

W4, W8 = parse_scheme("w4a16"), parse_scheme("w8a16")


@pytest.mark.parametrize("case", CASES)
def test_every_layer_is_in_one_group(case):
    spec = spec_of(CASES[case])
    layers = [layer for group in fused_groups(spec, {}) for layer in group.layers]
    assert sorted(layers) == sorted([spec.embedding.name, *(linear.name for linear in spec.linears())])


def test_what_shares_an_input_or_its_bytes_is_one_group():
    tied = [group.name for group in fused_groups(spec_of(CASES["llama, tied, wide heads"]), {})]
    assert tied[:5] == [
        "model.embed_tokens+lm_head",
        "model.layers.0.self_attn.q_proj+k_proj+v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj+up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert len(tied) == 1 + 4 * 3
    untied = [group.name for group in fused_groups(spec_of(CASES["llama"]), {})]
    assert (untied[0], untied[-1]) == ("model.embed_tokens", "lm_head")


def test_a_fixed_layer_has_its_scheme_alone_and_the_others_of_its_group_stay_together():
    fixed = {"model.layers.1.self_attn.k_proj": W8, "model.layers.2.mlp.down_proj": None}
    groups = {group.name: group for group in fused_groups(spec_of(CASES["llama"]), fixed)}
    assert groups["model.layers.1.self_attn.k_proj"].candidates == (W8,)
    assert groups["model.layers.1.self_attn.q_proj+v_proj"].candidates == CANDIDATES
    assert groups["model.layers.2.mlp.down_proj"].candidates == (None,)
    assert groups["model.layers.2.mlp.down_proj"].stored_bytes(None) == 4 * 64 * 80


@pytest.mark.parametrize("case", ["llama", "qwen3", "gpt2", "phi3"])
@pytest.mark.parametrize("scheme", [W4, W8])
def test_groups_take_as_many_bytes_as_the_model_with_another_scheme_takes_more(case, scheme):
    spec = spec_of(CASES[case])
    groups = fused_groups(spec, {})
    other = CANDIDATES[0]
    more = sum(group.stored_bytes(scheme) - group.stored_bytes(other) for group in groups)
    names = [layer for group in groups for layer in group.layers]
    sizes = [quantized_bytes(spec, dict.fromkeys(names, each)) for each in (scheme, other)]
    assert more == sizes[0] - sizes[1]
    assert sum(group.weights for group in groups) * 8 > sum(group.stored_bytes(W4) for group in groups)
