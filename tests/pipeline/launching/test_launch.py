"""`llmopt launch`: a plan run as people run it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmopt.cli.app import app
from llmopt.cli.outcome import run
from llmopt.errors import UsageError
from llmopt.model.source import open_source
from llmopt.partition.cluster import load_cluster
from llmopt.pipeline.launching import launch as module
from tests.plans import CLUSTER, plan_file

ELSEWHERE = CLUSTER | {"nodes": [{"name": "there", "devices": {"cpu": 1}}]}


@pytest.fixture
def plan(six_heads, tmp_path):
    def write(*stages, **options):
        return str(plan_file(tmp_path / "plan.json", six_heads, stages, **options))

    return write


def test_a_launch_is_verified_measured_and_corrects_the_cluster(plan, tmp_path, capsys):
    path = tmp_path / "corrected.yaml"
    words = ["launch", plan((1, 1), (3, 2), micro_batches=2), "--verify", "--json", "--rounds", "2"]
    assert run(app, [*words, "--calibrate", str(path), "--materialize", str(tmp_path / "shards")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == "llmopt.launch/1"
    assert [len(row) for row in result["tokens"]] == [4, 4]
    assert result["verified"]["tokens_equal"]
    assert result["verified"]["largest_difference"] < 1e-4
    first, last = result["stages"]
    assert (first["prefill_sent_bytes"], first["decode_sent_bytes"]) == (2 * 2 * 6 * 48 * 4, 2 * 2 * 48 * 4)
    assert (last["prefill_sent_bytes"], last["prefill_added_bytes"] > 0) == (2 * 8, True)
    for stage in result["stages"]:
        for name in ("prefill_ms", "decode_ms", "memory_bytes"):
            numbers = stage[name]
            assert numbers["error"] == pytest.approx(numbers["predicted"] / numbers["measured"] - 1)
    ratios = [stage["prefill_ms"]["predicted"] / stage["prefill_ms"]["measured"] for stage in result["stages"]]
    speed = load_cluster(path).device_class("cpu").speeds["float32"]
    assert speed.tflops == pytest.approx(0.05 * (ratios[0] * ratios[1]) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_ranks_quantize_as_a_single_process_does(plan, six_heads, capsys, scheme):
    linears = [linear.name for block in open_source(str(six_heads)).spec.blocks for linear in block.linears()]
    schemes = dict.fromkeys(linears, scheme) | {"model.embed_tokens": "w8a16", "lm_head": "w8a16"}
    path = plan((2, 1), (2, 2), schemes=schemes)
    assert run(app, ["launch", path, "--verify", "--json", "--rounds", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["verified"]
    assert found["relative_error"] < (1e-5 if scheme == "w4a16" else 0.02)


def test_torchrun_runs_a_plan_and_one_rank_speaks(plan, six_heads):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmopt"]
    words = ["launch", plan((2, 1), (2, 1)), "--verify", "--rounds", "1"]
    done = subprocess.run([*command, *words], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verified: the tokens of a single process") == 1


def test_what_was_launched_must_be_what_a_single_process_says(plan, capsys, monkeypatch):
    def other(job, shares):
        outcome = module_run_job(job, shares=shares)
        return type(outcome)(ids_BT=outcome.ids_BT, logits_BTV=outcome.logits_BTV + change, reports=outcome.reports)

    module_run_job, change = module.run_job, torch.tensor(2e-4)
    monkeypatch.setattr(module, "run_job", other)
    assert run(app, ["launch", plan((4, 1)), "--verify", "--rounds", "1"]) == 3
    assert re.search(
        r"the same tokens as a single process, and logits that differ by up to 0\.0002", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("stages", "options", "told"),
    [
        (((4, 4),), {}, "stage 0 cannot be cut over 4 ranks: 6 attention heads do not divide by 4"),
        (((4, 4),), {}, "legal degrees: 1, 2, 3, 6"),
        (((2, 1), (1, 1)), {}, "the stages hold 3 blocks, and the model has 4"),
        (((4, 1),), {"prompt": 62}, "62 tokens of prompt and 4 of output, where the model reads 64"),
        (((4, 1),), {"micro_batches": 7}, "7 micro-batches of 2 × 6 tokens"),
        (((4, 1),), {"schemes": {"lm_hat": "w8a8"}}, "lm_hat is no linear of this model"),
        (((4, 1),), {"schemes": {"lm_head": "w8a8"}}, "lm_head is a table, and w8a8-channel-sym is for products"),
        (((4, 1),), {"cluster": {}}, "the plan's cluster is wrong"),
        (
            ((4, 1),),
            {"cluster": CLUSTER | {"nodes": [{"name": "there", "devices": {"cpu": 1}}]}},
            "no device 'here/cpu:0'",
        ),
        (((4, 1),), {"dtype": "float64"}, "ranks do not compute in float64"),
        (((4, 1),), {"prompt": 10**15}, "where the model reads 64"),
        (((4, 1),), {"batch": 10**15}, "1,000,000,000,000,000 prompts of 6 tokens"),
        (((4, 1),), {"micro_batches": 0}, "'micro_batches' is wrong"),
        (((4, 1),), {"schemes": {"lm_head": "w9a9"}}, "no scheme with 9-bit weights"),
        (((4, 1),), {"schema": "llmopt.plan/7"}, "this is no plan"),
    ],
)
def test_what_cannot_run_is_refused(plan, capsys, stages, options, told):
    assert run(app, ["launch", plan(*stages, **options)]) in {2, 3}
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edit", "code", "told"),
    [
        ({"model": "./nowhere"}, 3, "there is no such file or folder"),
        ({"stages": []}, 2, "the plan's 'stages' is wrong"),
        ({"stages": None}, 2, "the plan's 'stages' is wrong"),
        ({"predicted": {"ttft_ms": "soon"}}, 2, "the plan's 'predicted.ttft_ms' is wrong"),
    ],
)
def test_a_plan_that_was_edited_to_nonsense_is_refused(plan, capsys, edit, code, told):
    path = Path(plan((4, 1)))
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    assert run(app, ["launch", str(path)]) == code
    assert told in capsys.readouterr().err
    path.write_text(path.read_text()[:-20])
    assert run(app, ["launch", str(path)]) == 2
    assert "the plan is not JSON" in capsys.readouterr().err


def test_shards_of_another_plan_and_missing_ones_are_refused(plan, tmp_path, capsys, monkeypatch):
    shards = str(tmp_path / "shards")

    def nothing(job, shares):
        raise UsageError("shards are written, and nothing is run")

    monkeypatch.setattr(module, "run_job", nothing)
    assert run(app, ["launch", plan((2, 1), (2, 1)), "--materialize", shards]) == 2
    assert run(app, ["launch", plan((1, 1), (3, 1)), "--materialize", shards]) == 3
    assert "the shards are from another plan" in capsys.readouterr().err
    (tmp_path / "shards" / "rank-00001" / "model.safetensors").unlink()
    assert run(app, ["launch", plan((2, 1), (2, 1)), "--materialize", shards]) == 3
    assert "the shard of rank 1 (stage 1 on here/cpu:1) is missing" in capsys.readouterr().err
