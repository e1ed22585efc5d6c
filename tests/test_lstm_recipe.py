"""The recipe of the LSTM model on two devices, with a small one."""

import runpy
import sys
from pathlib import Path

import pytest

from llmopt.partition.cluster import load_cluster
from llmopt.partition.runtime.schedule import WHOLE, MicroBatches

RECIPE = Path(__file__).parent.parent / "recipes" / "lstm_two_devices.py"
CLUSTER = """\
schema: llmopt.cluster/1
devices: {cpu: {memory_gb: 8, speeds: {float32: {tflops: 0.05, gb_per_s: 10}}}}
nodes: [{name: here, devices: {cpu: 2}, link: {latency_us: 50, gb_per_s: 2}}]
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """What the recipe defines, for a model of four layers of width 16."""
    found = runpy.run_path(str(RECIPE))
    found["main"].__globals__.update(MODEL="lstm:4x16", SEQUENCES=2, TOKENS=12, MICRO_BATCHES=4)
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    monkeypatch.setattr(sys, "argv", ["lstm_two_devices.py", str(tmp_path / "cluster.yaml")])
    return found


def test_the_recipe_plans_runs_and_compares(recipe, capsys):
    recipe["main"]()
    one, two, verdict = capsys.readouterr().out.splitlines()
    assert one.startswith("1 × one core, 4 layers: ")
    assert two.startswith("2 × one core, ")
    assert verdict.startswith("faster by ")


def test_the_plan_of_the_real_model_is_half_and_half_and_nearly_twice_as_fast(recipe, tmp_path):
    names = recipe["main"].__globals__
    names.update({name: recipe[name] for name in ("SEQUENCES", "TOKENS", "MICRO_BATCHES")})  # those of its text
    spec = names["recurrent_spec"]("lstm:12x2048")
    speed, link = recipe["speeds_of"](load_cluster(tmp_path / "cluster.yaml"))
    alone_s, whole = recipe["predicted_s"](spec, speed, link, 1, WHOLE)
    both_s, items = recipe["predicted_s"](spec, speed, link, 2, MicroBatches(tokens=names["MICRO_BATCHES"]))
    assert [stage.stop for stage in recipe["layout_of"](whole, 12).stages] == [12]
    assert [stage.stop for stage in recipe["layout_of"](items, 12).stages] == [6, 12]
    count = names["MICRO_BATCHES"]
    assert 1.7 < alone_s / both_s < 2 * count / (count + 1)
