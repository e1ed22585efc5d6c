"""Cluster files: what they say, and where what is wrong with them stands."""

import pytest

from llmopt.errors import RecipeError
from llmopt.partition.cluster import cluster_from_json, known_devices, load_cluster, to_json, uncounted

FILE = """\
schema: llmopt.cluster/1
devices:
  mine: {memory_gb: 8, reserved_gb: 1, launch_us: 50, speeds: {float32: {tflops: 0.1, gb_per_s: 10}}}
nodes:
  - {name: a, count: 2, devices: {mine: 2, l4: 1}, link: {latency_us: 5, gb_per_s: 20}}
between: {latency_us: 50, gb_per_s: 1}
"""


@pytest.fixture
def load(tmp_path):
    def load(text):
        (tmp_path / "c.yaml").write_text(text)
        return load_cluster(tmp_path / "c.yaml")

    return load


def test_devices_are_named_by_node_and_class(load):
    names = [(device.name, device.node) for device in load(FILE).all_devices()]
    assert names[:4] == [("a0/mine:0", 0), ("a0/mine:1", 0), ("a0/l4:0", 0), ("a1/mine:0", 1)]


def test_units_are_those_of_the_program_inside(load):
    cluster = load(FILE)
    mine = cluster.device_class("mine")
    assert (mine.usable_bytes, mine.launch_s) == (7e9, pytest.approx(5e-5))
    assert cluster.between.seconds(1e9) == pytest.approx(1.00005)


def test_a_cluster_survives_a_plan(load):
    cluster = load(FILE)
    again = cluster_from_json(to_json(cluster))
    assert again.all_devices() == cluster.all_devices()
    assert again.device_class("l4") == known_devices()["l4"]


def test_known_devices_say_that_they_are_from_data_sheets():
    assert {device.source for device in known_devices().values()} == {"data sheet"}


@pytest.mark.parametrize(
    ("old", "new", "what", "hint"),
    [
        ("latency_us: 5,", "latncy_us: 5,", "unknown key 'latncy_us'", "latency_us"),
        ("memory_gb: 8", "memory_gb: -8", "should be greater than 0", None),
        ("memory_gb: 8", "memory_gb: .inf", "should be a valid number", None),
        ("reserved_gb: 1", "reserved_gb: 9", "nothing is left for a model", "lower reserved_gb"),
        ("float32", "flaot32", "neither a dtype nor a scheme", "float32"),
        ("count: 2", "count: 0", "greater than or equal to 1", None),
        ("count: 2", "count: 99999", "more than 100,000 devices", "are the counts right?"),
        ("l4: 1", "l40: 1", "nobody knows", "did you mean 'l40s'?"),
        ("between: {latency_us: 50, gb_per_s: 1}\n", "", "several nodes, no link", "add between"),
    ],
)
def test_a_mistake_is_named_with_what_was_meant(load, old, new, what, hint):
    assert old in FILE
    with pytest.raises(RecipeError) as caught:
        load(FILE.replace(old, new))
    assert what in caught.value.what
    assert "c.yaml:" in caught.value.where
    assert hint is None or hint in caught.value.hint


def test_a_note_says_of_which_classes_only_products_are_known():
    assert uncounted(cluster_from_json(WHOLE)) == ["what passes between products is not known, and not counted: bare"]


WHOLE = {
    "schema": "llmopt.cluster/1",
    "devices": {
        "bare": {"memory_gb": 8, "speeds": {"float32": {"tflops": 1, "gb_per_s": 10}}},
        "known": {"memory_gb": 8, "passing_gb_per_s": 9, "speeds": {"float32": {"tflops": 1, "gb_per_s": 10}}},
    },
    "nodes": [{"name": "a", "devices": {"bare": 1, "known": 1}, "link": {"latency_us": 1, "gb_per_s": 1}}],
}
