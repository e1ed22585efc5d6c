"""Budgets on the embedded model, through the command line: met or told to be out of reach, and explained."""

import json
import re
from dataclasses import replace

import pytest

from llmopt.artifact import load_manifest
from llmopt.errors import BudgetError
from llmopt.measure.size import model_bytes
from llmopt.pipeline import mixed
from llmopt.pipeline.prepare import prepare, with_plan
from llmopt.pipeline.quantize import execute
from llmopt.pipeline.request import QuantizeRequest
from llmopt.precision.budget import PerplexityBudget, SizeBudget, parse_budget
from llmopt.precision.plan import solve
from llmopt.progress import Silent
from llmopt.quantize.scheme import parse_scheme
from tests.whole_way import CommandLine


@pytest.fixture(autouse=True)
def few_windows(monkeypatch):
    """Enough to choose by, and fast."""
    monkeypatch.setattr(mixed, "MOST", 4)
    monkeypatch.setattr(mixed, "FEWEST", 4)
    monkeypatch.setattr(mixed, "WINDOW", 128)


@pytest.fixture
def llmopt(capfd):
    return CommandLine(capfd)


def prepared_for(budget, output, **more):
    return prepare(
        QuantizeRequest(model="demo", output=output, scheme=parse_scheme("w8a16"), budget=budget, **more), Silent()
    )


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """The embedded model's groups with what each scheme would cost them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(mixed, "MOST", 4)
    patch.setattr(mixed, "FEWEST", 4)
    prepared = with_plan(prepared_for(parse_budget("5bits"), tmp_path_factory.mktemp("out") / "out"), Silent())
    patch.undo()
    return prepared.plan.problem


def written(problem, budget, output):
    """The artifact of a plan, without estimating again what each scheme costs."""
    prepared = prepared_for(budget, output)
    mix = prepared.mix

    class Known:
        plan = staticmethod(lambda progress: solve(problem, budget))
        check = staticmethod(mix.check)

    return execute(replace(prepared, mix=Known()), Silent())


@pytest.mark.parametrize("megabytes", [1.8, 2.0, 2.4, 3.2])
def test_a_size_is_met_and_little_of_it_is_left(problem, tmp_path, megabytes):
    budget = SizeBudget(round(megabytes * 1e6))
    result = written(problem, budget, tmp_path / "out")
    size = model_bytes(tmp_path / "out")
    assert 0.98 * budget.model_bytes < size <= budget.model_bytes
    told = result.report.settings["budget"]
    assert told["measured"]["kl_divergence"]["value"] > 0
    assert told["predicted"]["kl_divergence"] == pytest.approx(solve(problem, budget).predicted_kl)
    assert any("predicted" in note and "measured" in note for note in result.report.notes)


def test_a_graph_larger_than_foreseen_is_made_again_within_the_budget(problem, tmp_path):
    blind = replace(problem, overhead_bytes=problem.overhead_bytes - 60_000)
    budget = SizeBudget(2_000_000)
    assert solve(blind, budget).model_bytes > 1_990_000
    result = written(blind, budget, tmp_path / "out")
    assert model_bytes(tmp_path / "out") <= budget.model_bytes
    assert result.plan.correction.more_bytes > 0


def losing(monkeypatch, changes):
    """Have the artifacts that are made, one after the other, show these changes of perplexity."""
    measure = mixed.measure_loss

    def measured(*arguments, **options):
        found = measure(*arguments, **options)
        return replace(found, perplexity=replace(found.perplexity, relative=changes.pop(0)))

    monkeypatch.setattr(mixed, "measure_loss", measured)


def test_a_perplexity_above_its_bound_is_planned_again_with_what_was_measured(problem, tmp_path, monkeypatch):
    losing(monkeypatch, [0.009, 0.004])
    budget = PerplexityBudget(0.005)
    result = written(problem, budget, tmp_path / "out")
    assert result.plan.correction.more_loss > 1.5
    assert result.plan.model_bytes > solve(problem, budget).model_bytes
    assert result.report.settings["budget"]["measured"]["perplexity_change"]["relative"] == 0.004


def test_a_perplexity_that_stays_above_its_bound_is_an_error_and_leaves_nothing(problem, tmp_path, monkeypatch):
    changes = [0.0052] * mixed.ROUNDS
    losing(monkeypatch, changes)
    with pytest.raises(BudgetError, match=r"\+0\.52% .* \+0\.5% perplexity was asked for"):
        written(problem, PerplexityBudget(0.005), tmp_path / "out")
    assert changes == []
    assert list(tmp_path.iterdir()) == []


def test_layers_that_patterns_name_keep_their_schemes_and_count(llmopt, tmp_path):
    options = ("--override", "layers.0.*=w8a16", "--ignore", "layers.3.mlp.down_proj", "--threads", "1", "--json")
    ended = llmopt("quantize", "demo", "-o", tmp_path / "out", "--budget", "2.8MB", *options)
    assert ended.code == 0, ended.err
    assert model_bytes(tmp_path / "out") <= 2_800_000
    report = json.loads(ended.out)
    layers = {layer["name"]: layer for layer in report["candidates"][0]["layers"]}
    assert {layer["scheme"] for name, layer in layers.items() if ".layers.0." in name} == {"w8a16-g64-sym"}
    assert layers["model.layers.3.mlp.down_proj"]["scheme"] is None
    assert layers["model.layers.1.mlp.up_proj"]["scheme"] == layers["model.layers.1.mlp.gate_proj"]["scheme"]
    assert layers["model.layers.1.mlp.up_proj"]["reason"] == "the least predicted loss within 2.8MB"
    assert layers["lm_head"]["scheme"] == layers["model.embed_tokens"]["scheme"]
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.budget, manifest.scheme, manifest.method) == ("2.8MB", "mixed", "rtn")
    assert "--budget 2.8MB --method rtn" in (tmp_path / "out" / "README.md").read_text()


def test_a_dry_run_explains_every_group_draws_the_curve_and_writes_nothing_else(llmopt, tmp_path):
    picture = tmp_path / "curve.svg"
    options = ("--budget", "2MB", "--explain", "--dry-run", "--threads", "1")
    ended = llmopt("quantize", "demo", "-o", tmp_path / "out", *options, "--plot", picture)
    assert ended.code == 0, ended.err
    assert len(re.findall(r"^model\..*(?:would save|would cost)", ended.out, re.MULTILINE)) == 1 + 4 * 4
    assert "2MB: at most" in ended.out
    assert picture.read_text().startswith("<?xml")
    assert [path.name for path in tmp_path.iterdir()] == ["curve.svg"]
    told = json.loads(llmopt("quantize", "demo", "-o", tmp_path / "out", *options, "--json").out)
    groups = told["budget"]["groups"]
    assert len(groups) == 1 + 4 * 4
    assert all(group["next_best"]["reason"] for group in groups)
    assert {layer["name"] for layer in told["layers"]} == {layer for group in groups for layer in group["layers"]}


def test_the_smallest_size_that_is_named_is_reached(llmopt, tmp_path):
    ended = llmopt("quantize", "demo", "-o", tmp_path / "out", "--budget", "1MB", "--threads", "1")
    assert ended.code == 3
    named = re.search(r"the smallest that can be reached is ([\d.]+MB)", ended.err)[1]
    assert not list(tmp_path.iterdir())
    options = ("--budget", named, "--dry-run", "--threads", "1")
    assert llmopt("quantize", "demo", "-o", tmp_path / "out", *options).code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--budget", "92"], "'92' is not a budget"),
        (["--budget", "2MB", "--scheme", "w8a8"], "rounds them"),
        (["--plot", "a.png"], "there is none"),
        (["--budget", "2MB", "--plot", "a.jpg"], "is no picture"),
        (["--budget", "2MB", "--plot", "nowhere/a.png"], "does not exist"),
        (["--budget", "2MB", "--calib", "text.txt"], "too little text"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(llmopt, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Once")
    ended = llmopt("quantize", "demo", "-o", tmp_path / "out", *words)
    assert ended.code == 2
    assert told in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_recipe_with_a_budget_is_done_once(llmopt, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    step = "{name: mixed, budget: 2MB}"
    recipe.write_text(
        f"schema: llmopt.recipe/1\nmodel: demo\noutput: {tmp_path / 'out'}\nthreads: 1\nsteps:\n  - quantize: {step}\n"
    )
    planned = json.loads(llmopt("run", recipe, "--dry-run", "--json").out)
    assert planned["artifacts"][str(tmp_path / "out" / "mixed")]["estimated_bytes"] == 2_000_000
    assert llmopt("run", recipe).code == 0
    assert model_bytes(tmp_path / "out" / "mixed") <= 2_000_000
    assert "kept" in llmopt("run", recipe).err
