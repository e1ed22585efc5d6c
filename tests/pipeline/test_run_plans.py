"""Recipes that plan: what is written, what gates say of predictions, and what is refused."""

import json
from pathlib import Path

import pytest

from llmopt.cli.vocabulary import vocabulary
from llmopt.errors import ArtifactError, BudgetError, ExitCode, RecipeError, UsageError
from llmopt.partition.plan import read_plan
from llmopt.pipeline.partition import PartitionRequest, partition
from llmopt.pipeline.run import RunOptions, plan, run
from llmopt.progress import Silent
from llmopt.recipe import load_recipe

CLUSTER = """\
schema: llmopt.cluster/1
devices:
  core: {memory_gb: 0.1, price_per_hour: 1, launch_us: 50, speeds: {float32: {tflops: 0.05, gb_per_s: 10}}}
nodes:
  - {name: n, devices: {core: 2}, link: {latency_us: 30, gb_per_s: 5}}
"""
RECIPE = """\
schema: llmopt.recipe/1
model: demo
output: %s
steps:
  - partition: {name: split, cluster: c.yaml, prompt: 32, output: 8, dtype: float32, slo: [ttft_ms<=1000]}
gates:
  - {candidate: split, assert: "tpot_ms <= 50"}
"""


@pytest.fixture
def ran(tmp_path):
    """Run the recipe with something else in it."""
    (tmp_path / "c.yaml").write_text(CLUSTER)

    def ran(old="", new="", **options):
        (tmp_path / "r.yaml").write_text((RECIPE % (tmp_path / "out")).replace(old, new))
        recipe = load_recipe(tmp_path / "r.yaml", vocabulary=vocabulary())
        return run(recipe, RunOptions(threads=1, seed=0, **options), Silent())

    return ran


def test_a_plan_and_its_picture_stand_in_the_step_s_folder(ran, tmp_path):
    result = ran()
    made = result.plans[0]
    assert made.path == tmp_path / "out" / "split" / "plan.json"
    assert read_plan(made.path) == made.plan
    assert (made.path.parent / "timeline.svg").read_text().startswith("<svg")
    assert (result.exit_code, result.artifacts, result.report) == (ExitCode.DONE, (), None)


def test_a_gate_compares_the_prediction(ran):
    kept = ran()
    assert (kept.gates[0].verdict, kept.gates[0].value) == ("pass", kept.plans[0].plan.predicted.tpot_ms)
    broken = ran("tpot_ms <= 50", "tpot_ms <= 0.001")
    assert (broken.gates[0].verdict, broken.exit_code) == ("fail", ExitCode.GATE_FAILED)


def test_a_promise_that_no_plan_keeps_ends_the_recipe(ran, tmp_path):
    with pytest.raises(BudgetError, match=r"no plan keeps ttft_ms<=0\.01"):
        ran("ttft_ms<=1000", "ttft_ms<=0.01")
    assert not (tmp_path / "out" / "split").exists()


def test_the_same_plan_is_kept_and_another_one_only_replaced_by_force(ran):
    first = ran().plans[0].path
    before = first.stat().st_mtime_ns
    assert ran().plans[0].path.stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="made from something else"):
        ran("prompt: 32", "prompt: 64")
    assert ran("prompt: 32", "prompt: 64", force=True).plans[0].plan.workload.prompt == 64


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("tpot_ms <= 50", "perplexity <= +1%", "a plan does not predict that"),
        ("tpot_ms <= 50", "tpot_ms <= 0.8x", "a plan does not predict that"),
        ("ttft_ms<=1000", "ttft<=1000", "there is no 'ttft'"),
        ("c.yaml", "gone.yaml", "there is no file"),
        ("prompt: 32", "objectiv: tpot", "unknown key 'objectiv'"),
        ("{candidate: split, assert: \"tpot_ms <= 50\"}", "tpot_ms <= 50", "gates judge what was measured"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_done(ran, tmp_path, old, new, what):
    with pytest.raises(RecipeError, match=what):
        ran(old, new)
    assert not list(Path(tmp_path / "out").rglob("*.json"))


def test_bench_has_nothing_to_measure_where_all_steps_plan(ran):
    with pytest.raises(UsageError, match="no step makes one"):
        ran("gates:", "bench: {}\ngates:")


def test_a_dry_run_finds_mistakes_and_writes_nothing(ran, tmp_path):
    ran()
    recipe = load_recipe(tmp_path / "r.yaml", vocabulary=vocabulary())
    elsewhere = recipe.model_copy(update={"output": str(tmp_path / "other")})
    assert plan(elsewhere, RunOptions(threads=1, seed=0), Silent()) == []
    assert not (tmp_path / "other").exists()


def test_the_plan_of_a_recipe_is_the_plan_of_the_command(ran, tmp_path):
    request = PartitionRequest(
        model="demo", cluster=tmp_path / "c.yaml", output=tmp_path / "p.json", prompt=32, output_tokens=8,
        dtype="float32", promises=("ttft_ms<=1000",),
    )  # fmt: skip
    assert partition(request, Silent()).plan == ran().plans[0].plan
    assert json.loads((tmp_path / "p.json").read_text())["schema"] == "llmopt.plan/1"
