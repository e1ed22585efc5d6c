"""Plans for models, from their configs alone."""

import json
from dataclasses import replace

import pytest

from llmopt.cli.partition import said
from llmopt.errors import ArtifactError, BudgetError, ExitCode, UnsupportedError, UsageError
from llmopt.partition.plan import read_plan
from llmopt.partition.timeline import as_text
from llmopt.pipeline.partition import PartitionRequest, partition
from llmopt.progress import Silent

CONFIG = {
    "model_type": "llama",
    "vocab_size": 150_000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
CLUSTER = """\
schema: llmopt.cluster/1
devices:
  core: {memory_gb: %s, price_per_hour: 1, launch_us: 50, speeds: {float32: {tflops: 0.05, gb_per_s: 10}}}
nodes:
  - {name: n, devices: {core: 3}, link: {latency_us: 30, gb_per_s: 5}}
"""


@pytest.fixture
def request_(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "c.yaml").write_text(CLUSTER % 4)
    return PartitionRequest(
        model=str(tmp_path / "model"), cluster=tmp_path / "c.yaml", output=tmp_path / "plan.json", prompt=64, batch=4
    )


def made(request, **changes):
    return partition(replace(request, force=True, **changes), Silent()).plan


def test_a_plan_is_what_its_file_says(request_):
    plan = made(request_)
    assert read_plan(request_.output) == plan


def test_a_large_head_gets_fewer_blocks_beside_it_than_an_even_split(request_):
    plan = made(request_, degree=1, objective="throughput", micro_batches=4, replicas=1)
    blocks = [stage.layers[1] - stage.layers[0] for stage in plan.stages]
    assert sum(blocks) == 12
    assert blocks[-1] < 12 / len(blocks) < blocks[0]
    even = plan.baselines["even_split"]
    assert plan.predicted.throughput_tokens_per_s > even.throughput_tokens_per_s
    assert plan.gap == pytest.approx(0, abs=1e-9)


def test_the_cuts_of_a_plan_given_back_have_its_price(request_):
    plan = made(request_, degree=1, objective="tpot", replicas=1, micro_batches=4)
    split = ",".join(str(stage.layers[1] - stage.layers[0]) for stage in plan.stages)
    order = ",".join(stage.devices[0] for stage in plan.stages)
    own = made(request_, split=split, order=order, replicas=1, micro_batches=4)
    assert own.predicted.tpot_ms == pytest.approx(plan.predicted.tpot_ms)
    worse = made(request_, split="1,1,10", replicas=1, micro_batches=4)
    assert worse.gap > 0.05


def test_three_divides_nine_heads_and_three_and_two_does_not(request_):
    assert made(request_, degree=3).stages[0].tp == 3
    with pytest.raises(UsageError, match="9 attention heads do not divide by 2") as caught:
        made(request_, degree=2)
    assert caught.value.hint == "legal degrees: 1, 3"


def test_a_tied_table_is_there_once_in_one_stage_and_twice_in_two(request_):
    table = 150_000 * 1024 * 4
    one, two = made(request_, split="12"), made(request_, split="6,6")
    assert sum(stage.weight_bytes for stage in two.stages) - one.stages[0].weight_bytes == table


def test_what_does_not_fit_says_what_is_missing_and_what_would_do(request_):
    request_.cluster.write_text(CLUSTER % 0.3)
    with pytest.raises(BudgetError, match=r"1.143 GB of weights and 14.16 MB of cache do not fit into") as caught:
        made(request_)
    assert "add" in caught.value.hint
    assert "like core" in caught.value.hint


def test_promises_are_kept_or_there_is_no_plan(request_):
    free = made(request_)
    with pytest.raises(BudgetError, match="no plan keeps tpot_ms<="):
        made(request_, promises=(f"tpot_ms<={free.predicted.tpot_ms / 10:.6f}",))
    with pytest.raises(UsageError, match="the wrong way round"):
        made(request_, promises=("tpot_ms>=3",))


def test_the_fewest_devices_are_the_fewest_that_do(request_):
    assert made(request_, objective="devices").ranks == 1
    slow = made(request_, objective="devices", degree=1).predicted.ttft_ms
    fast = made(request_, objective="price", promises=(f"ttft_ms<={slow * 0.8:.6f}",))
    assert fast.ranks * fast.replicas > 1
    assert fast.value == fast.ranks * fast.replicas


def test_joint_quantizes_no_more_than_it_must(request_):
    assert made(request_, joint=True).schemes == {}
    request_.cluster.write_text(CLUSTER % 0.34)
    plan = made(request_, joint=True, objective="throughput")
    used = {name: scheme for name, scheme in plan.schemes.items() if "layers." in name}
    assert 0 < len(used) < 12 * 7 or "w4a16-g32-asym" not in used.values()


def test_other_engines_get_the_layers_of_every_stage(request_):
    result = partition(replace(request_, degree=1, split="5,4,3", export="vllm"), Silent())
    assert result.exported["environment"] == {"VLLM_PP_LAYER_PARTITION": "5,4,3"}
    again = replace(request_, degree=1, split="5,4,3", force=True)
    devices = partition(replace(again, export="accelerate"), Silent()).exported["device_map"]
    assert (devices["model.layers.4"], devices["model.layers.5"], devices["lm_head"]) == (0, 1, 0)
    with pytest.raises(UnsupportedError, match="no tensor parallelism"):
        partition(replace(again, degree=3, split="12", export="accelerate"), Silent())


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        (("stages", 0, "layers"), [0, 5], "where block 5 is next"),
        (("stages", 0, "tp"), 2, "1 devices for a tensor-parallel degree of 2"),
        (("stages", 0, "lm_head"), True, "cannot have that embedding or head"),
        (("stages", 0, "prefill_ms"), -1, "is wrong"),
    ],
)
def test_a_plan_that_does_not_hang_together_is_refused(request_, place, value, what):
    made(request_, split="6,6")
    content = json.loads(request_.output.read_text())
    target = content
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    request_.output.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=what):
        read_plan(request_.output)


def test_what_an_engine_is_told_can_be_pasted_where_it_is_told_it(request_):
    result = partition(replace(request_, degree=1, split="5,4,3", export="vllm"), Silent())
    first, second, third, *_ = said(result.exported).split()
    assert (first, second, third) == ("VLLM_PP_LAYER_PARTITION=5,4,3", "vllm", "serve")


def test_a_picture_of_another_kind_is_refused(request_, tmp_path):
    with pytest.raises(UsageError, match="another kind"):
        partition(replace(request_, timeline=tmp_path / "picture.png"), Silent())
    assert not request_.output.exists()


def test_a_folder_is_no_file_to_write_a_plan_into(request_):
    request_.output.mkdir()
    with pytest.raises(ArtifactError, match="a folder is there"):
        partition(replace(request_, force=True), Silent())


def test_a_timeline_names_every_stage(request_, tmp_path):
    made(request_, split="4,4,4", micro_batches=4, timeline=tmp_path / "t.svg")
    picture = (tmp_path / "t.svg").read_text()
    assert all(f"{number} n/core:{number}" in picture for number in range(3))


def test_the_bottleneck_is_named_in_words_and_in_the_picture(request_, tmp_path):
    plan = made(request_, degree=1, split="1,10,1", micro_batches=4, replicas=1, timeline=tmp_path / "t.svg")
    assert "bottleneck: stage 1 on n/core:1" in as_text(plan)
    assert "bottleneck of prefill: stage 1" in (tmp_path / "t.svg").read_text()


def test_a_plan_goes_into_a_folder_that_is_there(request_, tmp_path):
    for changes in ({"output": tmp_path / "gone" / "p.json"}, {"timeline": tmp_path / "gone" / "t.svg"}):
        with pytest.raises(ArtifactError, match="no folder to write into"):
            made(request_, **changes)


def test_a_plan_that_is_there_is_replaced_by_force_alone(request_):
    made(request_)
    with pytest.raises(ArtifactError, match="something is there already"):
        partition(request_, Silent())


@pytest.mark.parametrize(
    ("changes", "what", "hint"),
    [
        ({"objective": "tpto"}, "no objective 'tpto'", "tpot"),
        ({"promises": ("ttft<=3",)}, "no 'ttft'", "ttft_ms"),
        ({"promises": ("soon",)}, "is no promise", "ttft_ms<=300"),
        ({"dtype": "f32"}, "no dtype 'f32'", "float32"),
        ({"split": "6,5"}, "are 11 blocks, and the model has 12", "their sum"),
        ({"split": "0,12"}, "the first stage has a block", None),
        ({"split": "3,3,3,3"}, "where there are 3", "fewer stages"),
        ({"split": "a"}, "is no split", "10,12,8"),
        ({"order": "n/core:0, n/cor:1"}, "no device 'n/cor:1'", "n/core:1"),
        ({"order": "n/core:0,n/core:0"}, "there twice", None),
        ({"replicas": 2}, "do not divide into 2 replicas", "divides"),
        ({"micro_batches": 9999}, "9999 micro-batches", "at most 64"),
        ({"prompt": 4096}, "where the model reads 4096", "context"),
        ({"scheme": "w8a16", "joint": True}, "--joint chooses", "leave one"),
    ],
)
def test_a_contradiction_is_a_usage_error_with_what_was_meant(request_, changes, what, hint):
    with pytest.raises(UsageError, match=what) as caught:
        made(request_, **changes)
    assert caught.value.exit_code is ExitCode.USAGE
    assert hint is None or hint in caught.value.hint
