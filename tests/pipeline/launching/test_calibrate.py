"""A cluster file corrected by a run predicts that run, and others nearer than before."""

from dataclasses import replace

import pytest

from llmopt.model.families import spec_from_config
from llmopt.partition.cluster import cluster_from_json
from llmopt.partition.cost import Precision
from llmopt.partition.plan import Workload
from llmopt.partition.search import Model, Search, Wanted
from llmopt.pipeline.launching.calibrate import calibrated
from llmopt.pipeline.launching.result import Compared, LaunchResult, StageResult

SPEED = {"tflops": 0.09, "gb_per_s": 20, "row_ns": 120, "packing_gb_per_s": 9, "passing_gb_per_s": 6, "call_us": 10}
DEVICE = {"memory_gb": 8, "launch_us": 200, "attention": {"tflops": 0.05, "gb_per_s": 8}, "passing_gb_per_s": 20}
CLUSTER = {
    "schema": "llmopt.cluster/1",
    "devices": {"cpu": DEVICE | {"speeds": {"float32": SPEED}}},
    "nodes": [{"name": "here", "devices": {"cpu": 2}, "link": {"latency_us": 100, "gb_per_s": 0.01}}],
}


@pytest.fixture
def tiny_llama_spec():
    """Four blocks of width 256."""
    config = {"model_type": "llama", "vocab_size": 500, "hidden_size": 256, "intermediate_size": 512}
    config |= {"num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 128}
    return spec_from_config(config)


def planned(spec, cluster, split):
    model = Model(name="model", spec=spec, precision=Precision(dtype="float32", schemes={}))
    wanted = Wanted(objective="ttft", split=split, micro_batches=1)
    return Search(model=model, cluster=cluster, workload=Workload(prompt=64, output=8), wanted=wanted).plan()


def run_as(plan, prefill, decode):
    """A run whose stages took so many times what was predicted; links as predicted."""

    def stage(one):
        prefill_ms, decode_ms = one.prefill_ms - one.prefill_hop_ms, one.decode_ms - one.decode_hop_ms
        return StageResult(
            devices=one.devices,
            layers=one.layers,
            prefill_ms=Compared(predicted=prefill_ms, measured=prefill_ms * prefill),
            decode_ms=Compared(predicted=decode_ms, measured=decode_ms * decode),
            memory_bytes=Compared(predicted=None, measured=None),
            prefill_sent_bytes=0,
            decode_sent_bytes=0,
            prefill_added_bytes=0,
            decode_added_bytes=0,
            load_s=0.0,
        )

    unknown = Compared(predicted=None, measured=None)
    return LaunchResult(
        model="model",
        tokens=(),
        texts=None,
        ttft_ms=unknown,
        tpot_ms=unknown,
        stages=tuple(map(stage, plan.stages)),
        rounds=1,
        verified=None,
    )


@pytest.mark.parametrize("split", [(1, 3), (3, 1)])
def test_the_corrected_file_predicts_the_run_and_a_plan_that_was_not_run(split, tiny_llama_spec):
    plan = planned(tiny_llama_spec, cluster_from_json(CLUSTER), (2, 2))
    corrected = calibrated(plan, run_as(plan, prefill=1.2, decode=1.3))
    for counts in ((2, 2), split):
        before, after = (planned(tiny_llama_spec, one, counts) for one in (cluster_from_json(CLUSTER), corrected))
        for old, new in zip(before.stages, after.stages, strict=True):
            assert new.decode_hop_ms == pytest.approx(old.decode_hop_ms)
            took = [one.decode_ms - one.decode_hop_ms for one in (old, new)]
            assert took[1] == pytest.approx(1.3 * took[0], rel=1e-3)


def test_a_run_as_predicted_changes_nothing(tiny_llama_spec):
    cluster = cluster_from_json(CLUSTER)
    plan = planned(tiny_llama_spec, cluster, (2, 2))
    corrected = calibrated(plan, run_as(plan, prefill=1.0, decode=1.0))
    assert corrected.device_class("cpu") == cluster.device_class("cpu")
    assert replace(plan, cluster={}) == replace(planned(tiny_llama_spec, corrected, (2, 2)), cluster={})
