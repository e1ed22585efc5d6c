"""What neighbours, waiting and formats do to what a model costs."""

import pytest

from llmopt.model.families import spec_from_config
from llmopt.partition.cluster import cluster_from_json
from llmopt.partition.cost import Costs, Group, Precision, cut
from llmopt.partition.device import DeviceClass, Link
from llmopt.partition.plan import Workload
from llmopt.partition.search import Model, Search, Wanted
from llmopt.quantize.scheme import parse_scheme

BARE = DeviceClass(memory_gb=8, speeds={"float32": {"tflops": 0.1, "gb_per_s": 10}})
SLOWED = BARE.model_copy(update={"shared": 0.5, "shared_token": 0.8, "waking_us": 70})


@pytest.fixture(scope="module")
def spec():
    config = {"model_type": "llama", "vocab_size": 500, "hidden_size": 256, "intermediate_size": 512}
    config |= {"num_hidden_layers": 4, "num_attention_heads": 4, "tie_word_embeddings": True}
    return spec_from_config(config | {"max_position_embeddings": 128})


def costs(spec, device, *, micro_batches=1, sequences=1, degree=1, schemes=None):
    work = Workload(prompt=64, output=8, batch=sequences)
    precision = Precision(dtype="float32", schemes=schemes or {})
    link = Link(latency_us=0, gb_per_s=1e6)
    group = Group(device=device, kind="core", degree=degree, link=link)
    return Costs(spec=spec, precision=precision, workload=work, cut=cut(micro_batches, sequences)).on(group)


def test_neighbours_that_work_slow_a_device_and_those_that_wait_do_not(spec):
    alone, slowed = costs(spec, BARE), costs(spec, SLOWED)
    assert slowed.prefill_s[0] == pytest.approx(alone.prefill_s[0])
    alone, slowed = (costs(spec, one, micro_batches=4, sequences=4) for one in (BARE, SLOWED))
    assert slowed.prefill_s[0] == pytest.approx(alone.prefill_s[0] / 0.5)
    # 16 tokens are two thirds of the way from 1 to 64.
    alone, slowed = (costs(spec, one, micro_batches=4) for one in (BARE, SLOWED))
    assert slowed.prefill_s[0] == pytest.approx(alone.prefill_s[0] / 0.6)
    alone, slowed = (costs(spec, one, degree=2) for one in (BARE, SLOWED))
    assert slowed.decode_s[0] == pytest.approx(alone.decode_s[0] / 0.8, rel=1e-3)


def test_a_stage_that_waits_between_tokens_wakes_and_one_that_never_waits_does_not(spec):
    def tpot_ms(device, split, groups=1):
        node = {"name": "here", "devices": {"core": 2}, "link": {"latency_us": 0, "gb_per_s": 1e6}}
        content = {"schema": "llmopt.cluster/1", "devices": {"core": device.model_dump()}, "nodes": [node]}
        model = Model(name="model", spec=spec, precision=Precision(dtype="float32", schemes={}))
        wanted = Wanted(objective="tpot", split=split, micro_batches=groups)
        cluster, work = cluster_from_json(content), Workload(prompt=64, output=8, batch=groups)
        return Search(model=model, cluster=cluster, workload=work, wanted=wanted).plan().predicted.tpot_ms

    waking = BARE.model_copy(update={"waking_us": 70})
    assert tpot_ms(waking, (4,)) == pytest.approx(tpot_ms(BARE, (4,)))
    assert tpot_ms(waking, (2, 2)) == pytest.approx(tpot_ms(BARE, (2, 2)) + 0.14)
    assert tpot_ms(waking, (2, 2), groups=2) == pytest.approx(tpot_ms(BARE, (2, 2), groups=2))


def test_codes_without_products_take_the_memory_of_floats_where_they_expand(spec):
    schemes = {linear.name: parse_scheme("w4a16") for linear in spec.blocks[0].linears()}
    floats, codes = costs(spec, BARE), costs(spec, BARE, schemes=schemes)
    expanded = costs(spec, BARE.model_copy(update={"expands": True}), schemes=schemes)
    assert codes.weight_bytes[0] < floats.weight_bytes[0] / 1.5
    assert expanded.weight_bytes[0] == floats.weight_bytes[0]


def test_products_within_blocks_have_a_factor_that_the_head_has_not(spec):
    speed = BARE.model_dump()["speeds"]["float32"] | {"block_factors": [[1, 1.5], [64, 1.2]]}
    plain, slower = costs(spec, BARE), costs(spec, DeviceClass(memory_gb=8, speeds={"float32": speed}))
    assert slower.decode_s[-1] == plain.decode_s[-1]
    assert plain.decode_s[1] < slower.decode_s[1] <= 1.5 * plain.decode_s[1]
    assert plain.prefill_s[1] < slower.prefill_s[1] <= 1.2 * plain.prefill_s[1]


def test_what_the_allocator_keeps_is_a_part_of_the_activations(spec):
    speed = BARE.model_dump()["speeds"]["float32"] | {"slack": 0.5}
    kept = costs(spec, DeviceClass(memory_gb=8, speeds={"float32": speed}))
    assert kept.activation_bytes == pytest.approx(1.5 * costs(spec, BARE).activation_bytes)


def test_weights_that_a_kernel_pads_take_the_memory_of_what_it_pads_to(spec):
    schemes = {linear.name: parse_scheme("w8a8") for linear in spec.blocks[0].linears()}
    plain, padded = (
        costs(spec, DeviceClass(memory_gb=8, speeds=BARE.model_dump()["speeds"] | {"w8a8": speed}), schemes=schemes)
        for speed in ({"tflops": 1, "gb_per_s": 9}, {"tflops": 1, "gb_per_s": 9, "padded_to": 512})
    )
    wide = sum(2 * one.out_features * (one.in_features == 256) for one in spec.blocks[0].linears())
    assert padded.weight_bytes[0] - plain.weight_bytes[0] == pytest.approx(128 * wide, rel=0.01)
