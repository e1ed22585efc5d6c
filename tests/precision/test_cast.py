"""What is kept in float32: each reason by itself, and what follows from how modules are connected."""

import dataclasses
import math

import pytest
import torch

from llmopt.errors import UsageError
from llmopt.precision.cast import CHUNK_WEIGHTS, Ranges, Seen, choose, modules, require_patterns, see_weight
from llmopt.precision.short import check_dtype, check_tolerance
from tests.families import CASES, spec_of

LLAMA, TIED, QWEN3 = (spec_of(CASES[name]) for name in ("llama", "llama, tied, wide heads", "qwen3"))
FINE = Seen(largest_weight=1.0, underflow=0.0, weight_error=2e-4, largest_input=10.0, largest_output=10.0, error=3e-4)
BLOCK = "model.layers.1"


def ranges(spec, *, embedded=1.0, residual=None, **seen):
    """All is fine but what is said: of modules of block 1, by the last part of the name; of others as well."""
    found = dict.fromkeys(modules(spec), FINE)
    for name, changes in seen.items():
        (place,) = (
            known
            for known in found
            if known.startswith(BLOCK) == (name not in {"lm_head", "embed_tokens"}) and known.endswith(name)
        )
        found[place] = dataclasses.replace(FINE, **changes)
    return Ranges(modules=found, embedded=embedded, residual=residual or [(20.0, 30.0)] * len(spec.blocks))


def kept(spec, found, dtype="fp16", **options):
    return {choice.name: choice.reason for choice in choose(spec, found, dtype, **options).kept}


def test_what_is_fine_is_cast():
    plan = choose(LLAMA, ranges(LLAMA), "fp16")
    assert plan.kept == ()
    assert plan.residual_from is None
    assert [layer.name for layer in plan.layers()] == list(modules(LLAMA))
    assert {(layer.scheme, layer.method, layer.relative_error) for layer in plan.layers()} == {("fp16", "cast", 3e-4)}


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        ({"largest_weight": 7e4}, "overflow: its weights reach 7e+04, and fp16 ends at 65504"),
        ({"largest_input": 1e5}, "overflow: what it reads reaches 1e+05, and fp16 ends at 65504"),
        ({"largest_output": 4e4}, "overflow: what it gives reaches 4e+04, and fp16 ends at 65504, with a margin of 2"),
        ({"underflow": 0.25}, "underflow: 25.0% of its weights would be zero in fp16"),
        ({"error": 0.03}, "it would lose 3.00%, and 1.00% is allowed"),
        ({"weight_error": 0.03}, "it would lose 3.00%, and 1.00% is allowed"),
        ({"error": math.inf}, "it would lose inf%, and 1.00% is allowed"),
    ],
)
def test_a_module_is_kept_for_a_reason_of_its_own(seen, reason):
    assert kept(LLAMA, ranges(LLAMA, o_proj=seen)) == {f"{BLOCK}.self_attn.o_proj": reason}


def test_weights_have_no_margin_for_they_are_known():
    assert kept(LLAMA, ranges(LLAMA, o_proj={"largest_weight": 6e4})) == {}


def test_what_overflows_fp16_does_not_overflow_bf16():
    found = ranges(LLAMA, residual=[(1e6, 1e7)] * 3, o_proj={"largest_output": 1e6}, down_proj={"largest_input": 1e9})
    assert kept(LLAMA, found, "bf16") == {}
    assert kept(LLAMA, ranges(LLAMA, o_proj={"largest_output": 3e38}), "bf16")


def test_the_tolerance_is_what_was_asked_for():
    found = ranges(LLAMA, o_proj={"error": 0.03})
    assert kept(LLAMA, found, tolerance=0.05) == {}
    assert len(kept(LLAMA, found, tolerance=1e-5)) == len(list(modules(LLAMA)))


def test_what_was_asked_for_is_kept_and_told_first():
    found = ranges(LLAMA, o_proj={"error": 0.03})
    reasons = kept(LLAMA, found, keep_fp32=["lm_head", "layers.1.self_attn.o_proj"])
    assert reasons == {
        f"{BLOCK}.self_attn.o_proj": "asked for: matches 'layers.1.self_attn.o_proj'",
        "lm_head": "asked for: matches 'lm_head'",
    }


def test_attention_has_one_dtype():
    reasons = kept(LLAMA, ranges(LLAMA, k_proj={"largest_output": 1e5}))
    assert set(reasons) == {f"{BLOCK}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")}
    assert reasons[f"{BLOCK}.self_attn.v_proj"] == f"attention computes in one dtype: {BLOCK}.self_attn.k_proj is kept"
    reasons = kept(QWEN3, ranges(QWEN3, k_norm={"largest_weight": 1e5}))
    assert {name.rpartition(".")[2] for name in reasons} == {"k_norm", "q_proj", "k_proj", "v_proj"}


def test_a_product_that_overflows_keeps_what_writes_and_what_reads_it():
    reasons = kept(LLAMA, ranges(LLAMA, down_proj={"largest_input": 1e5}))
    assert {name.rpartition(".")[2] for name in reasons} == {"gate_proj", "up_proj", "down_proj"}
    assert reasons[f"{BLOCK}.mlp.up_proj"].startswith("overflow: what comes of its outputs reaches 1e+05")


@pytest.mark.parametrize(("place", "writer"), [(0, "self_attn.o_proj"), (1, "mlp.down_proj")])
def test_the_residual_stream_is_float32_from_where_it_overflows(place, writer):
    """And no later writer is kept for it: the sum of what is float32 already is float32."""
    levels = [30.0] * 2 + [1e5] * 4
    levels[2:4] = [1e5 if place == 0 else 30.0, 1e5]
    plan = choose(LLAMA, ranges(LLAMA, residual=list(zip(levels[::2], levels[1::2], strict=True))), "fp16")
    assert [choice.name for choice in plan.kept] == [f"{BLOCK}.{writer}"]
    assert plan.residual_from == f"{BLOCK}.{writer}"
    assert plan.kept[0].reason == ("overflow: the residual stream that it writes reaches 1e+05, and fp16 ends at 65504")


def test_a_stream_that_is_float32_already_asks_for_nothing():
    plan = choose(LLAMA, ranges(LLAMA, residual=[(1e5, 1e5)] * 3), "fp16", keep_fp32=["embed_tokens"])
    assert [choice.name for choice in plan.kept] == ["model.embed_tokens"]
    assert plan.residual_from == "model.embed_tokens"


def test_what_enters_the_first_block_may_overflow():
    plan = choose(LLAMA, ranges(LLAMA, embedded=1e5), "fp16")
    assert [choice.name for choice in plan.kept] == ["model.embed_tokens"]
    assert plan.residual_from == "model.embed_tokens"


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_head_and_its_table_are_one(name):
    plan = choose(TIED, ranges(TIED), "fp16", keep_fp32=[name])
    assert {choice.name for choice in plan.kept} == {"lm_head", "model.embed_tokens"}
    assert plan.residual_from == "model.embed_tokens"
    assert {choice.name for choice in choose(LLAMA, ranges(LLAMA), "fp16", keep_fp32=["lm_head"]).kept} == {"lm_head"}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_belongs_to_a_module(case):
    spec = spec_of(CASES[case])
    positions = spec.embedding.positions
    names = {tensor.name.rpartition(".")[0] for tensor in spec.tensors()}
    names -= set() if positions is None else {positions.name}
    assert set(modules(spec)) == names | {spec.head.name}


def test_what_is_lost_of_weights_is_what_torch_loses():
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    weight[:100] = 0
    weight[100:150] = 1e-9
    weight[200] = -9.0
    seen = see_weight(weight, torch.float16)
    assert seen.largest_weight == 9.0
    assert seen.underflow == pytest.approx(50 / 900)
    expected = float((weight - weight.half().float()).norm() / weight.norm())
    assert seen.weight_error == pytest.approx(expected, rel=1e-5)
    assert see_weight(weight, torch.bfloat16).underflow == 0


def test_large_tables_are_looked_at_in_pieces():
    weight = torch.zeros(CHUNK_WEIGHTS + 10)
    weight[-1], weight[0] = 1e-9, 3.0
    assert see_weight(weight, torch.float16).underflow == 0.5
    assert see_weight(torch.zeros(5), torch.float16) == Seen(largest_weight=0.0, underflow=0.0, weight_error=0.0)


def test_a_weight_beyond_the_end_loses_everything():
    assert see_weight(torch.tensor([1e5, 1.0]), torch.float16).weight_error == math.inf


def test_a_pattern_that_means_nothing_is_refused():
    require_patterns(LLAMA, ["norm", "layers.*.input_layernorm", "embed_tokens"])
    with pytest.raises(UsageError, match="'down_porj' matches no module") as caught:
        require_patterns(LLAMA, ["down_porj"])
    assert "did you mean 'down_proj'?" in str(caught.value.hint)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, 1.0, math.nan])
def test_a_tolerance_is_a_share(tolerance):
    with pytest.raises(UsageError, match="is no share of 1"):
        check_tolerance(tolerance)


def test_a_dtype_is_one_of_two():
    with pytest.raises(UsageError, match="no dtype 'fp8'") as caught:
        check_dtype("fp8")
    assert caught.value.hint == "--dtype fp16 or bf16"
