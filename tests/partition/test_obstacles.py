"""A plan that cannot be: what is in the way is named, and every change that is proposed makes one possible."""

import re
from dataclasses import replace

import pytest

from llmopt.errors import BudgetError, UsageError
from llmopt.model.families import spec_from_config
from llmopt.partition.cluster import cluster_from_json
from llmopt.partition.cost import Precision
from llmopt.partition.plan import Workload
from llmopt.partition.promises import parse_promise
from llmopt.partition.remedies import _grown, _quantized
from llmopt.partition.search import Search
from llmopt.partition.settings import Settings
from llmopt.partition.wanted import Model, Wanted

CONFIG = {
    "model_type": "llama",
    "vocab_size": 4000,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}


def search(memory_mb, *, devices=3, batch=1, prompt=64, wanted=None, **config):
    """A model of 15 MB, of which the head has 3, on devices of one node."""
    core = {"memory_gb": memory_mb / 1000, "speeds": {"float32": {"tflops": 0.05, "gb_per_s": 10}}}
    node = {"name": "n", "devices": {"core": devices}, "link": {"latency_us": 10, "gb_per_s": 5}}
    return Search(
        model=Model(name="m", spec=spec_from_config(CONFIG | config), precision=Precision(dtype="float32", schemes={})),
        cluster=cluster_from_json({"schema": "llmopt.cluster/1", "devices": {"core": core}, "nodes": [node]}),
        workload=Workload(prompt=prompt, output=16, batch=batch),
        wanted=wanted or Wanted(),
    )


def refused(asked):
    with pytest.raises(BudgetError) as caught:
        asked.plan()
    return caught.value


def changed(asked, hint):
    """The search with what a hint proposes."""
    if name := re.search(r"--scheme (\w+)", hint):
        settings = Settings(model=asked.model, cluster=asked.cluster, workload=asked.workload, wanted=asked.wanted)
        asked = replace(asked, model=_quantized(settings, name[1]).model)
    for flag in ("batch", "prompt"):
        if number := re.search(rf"--{flag} (\d+)", hint):
            asked = replace(asked, workload=replace(asked.workload, **{flag: int(number[1])}))
    if number := re.search(r"add (\d+) device", hint):
        asked = replace(asked, cluster=_grown(asked.cluster, asked.cluster.all_devices()[0], int(number[1])))
    if "--tp" in hint:
        asked = replace(asked, wanted=replace(asked.wanted, degree=None))
    return replace(asked, wanted=replace(asked.wanted, order=None)) if "--order" in hint else asked


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (search(4), r"MB of weights and .* kB of cache do not fit into .* on 3 devices"),
        (search(6, batch=400), r"of cache do not fit"),
        (search(2), r"do not fit into"),
        (search(3.4, devices=12, num_attention_heads=5, num_key_value_heads=5, hidden_size=200, intermediate_size=401),
         r"needs .* MB, and no device has more than .*; 5 attention heads do not divide by 2"),
        (search(4, devices=3, wanted=Wanted(degree=1)), r"do not fit into"),
        (search(9, wanted=Wanted(order=("n/core:0",))), r"do not fit into .* on 1 device"),
        (search(3, prompt=3000, batch=2), r"the activations of one micro-batch need"),
    ],
)  # fmt: skip
def test_what_is_in_the_way_is_named_and_each_proposal_helps(asked, what):
    error = refused(asked)
    assert re.search(what, error.what), error.what
    assert error.hint
    for hint in error.hint.split(", or "):
        assert changed(asked, hint).plan().stages, hint


def test_fewer_devices_or_more_sequences_than_proposed_would_not_do():
    asked = search(5, devices=2)
    more = int(re.search(r"add (\d+) device", refused(asked).hint)[1])
    one = asked.cluster.all_devices()[0]
    assert more == 1 or refused(replace(asked, cluster=_grown(asked.cluster, one, more - 1)))
    asked = search(9, devices=2, batch=300, wanted=Wanted(replicas=1))
    batch = int(re.search(r"--batch (\d+)", refused(asked).hint)[1])
    assert refused(replace(asked, workload=replace(asked.workload, batch=batch + 1)))


def test_a_degree_that_no_node_has_devices_for_says_which_there_is_room_for():
    with pytest.raises(UsageError, match="no node has more than 2 devices") as caught:
        search(20, devices=2, wanted=Wanted(degree=3)).plan()
    assert caught.value.hint == "there is room for 1"


def test_promises_that_exclude_each_other_are_named_together():
    one = Wanted(degree=1, replicas=1, objective="ttft")
    quick = search(20, batch=4, wanted=one).plan()
    much = search(20, batch=4, wanted=replace(one, objective="throughput")).plan()
    assert much.predicted.throughput_tokens_per_s > quick.predicted.throughput_tokens_per_s * 1.01
    promises = (
        parse_promise(f"ttft_ms<={quick.predicted.ttft_ms:.6f}"),
        parse_promise(f"throughput_tokens_per_s>={much.predicted.throughput_tokens_per_s * 0.999:.6f}"),
    )
    error = refused(search(20, batch=4, wanted=replace(one, promises=promises)))
    assert re.match(r"no plan keeps throughput_tokens_per_s>=.* beside ttft_ms<=", error.what)
    assert "what comes nearest has throughput_tokens_per_s" in error.hint
