"""What a machine can do, measured: numbers that make sense, and a file that says them."""

import pytest
import torch
import yaml

from llmopt.cli.app import app
from llmopt.cli.outcome import run
from llmopt.errors import UsageError
from llmopt.pipeline.probing import compute
from llmopt.pipeline.probing.cluster_file import cluster, write_cluster
from llmopt.pipeline.probing.compute import Compute, Speed, kinds, measure_compute
from llmopt.pipeline.probing.links import LARGE_BYTES, SMALL_BYTES, Link, _link
from llmopt.pipeline.probing.probe import DeviceProbe, Probe, ProbeRequest, probe
from llmopt.progress import Silent

ALONE = Compute(speeds={"float32": Speed(flops=5e10, bytes_per_s=1e10)}, block_s=1e-4)
FOUND = Probe(
    ranks=2,
    device=DeviceProbe(name="a core", memory_bytes=10**9, process_bytes=10**8, alone=ALONE, together=ALONE),
    messages=Link(latency_s=1e-4, bytes_per_s=1.23456e9),
    sums=Link(latency_s=2e-4, bytes_per_s=1e9),
)


def test_a_device_is_measured_in_every_kind_that_it_computes_with(monkeypatch):
    monkeypatch.setattr(compute, "_SECONDS", 0.0)
    monkeypatch.setattr(compute, "_BEYOND_CACHES_BYTES", 1 << 24)
    found = measure_compute(torch.device("cpu"))
    assert tuple(found.speeds) == kinds(torch.device("cpu"))
    for speed in found.speeds.values():
        assert 1e8 < speed.flops < 1e14
        assert 1e7 < speed.bytes_per_s < 1e13
    assert 1e-6 < found.block_s < 1


def test_a_link_is_a_line_through_two_sizes():
    found = _link(lambda size_bytes: 0.001 + size_bytes / 2e9)
    assert found.latency_s == pytest.approx(0.001)
    assert found.bytes_per_s == pytest.approx(2e9)
    assert _link(lambda size_bytes: 0.001).latency_s == pytest.approx(0.001)
    assert SMALL_BYTES < LARGE_BYTES


def test_the_cluster_file_says_what_was_found(tmp_path):
    path = tmp_path / "cluster.yaml"
    assert write_cluster(FOUND, path) == cluster(FOUND) == yaml.safe_load(path.read_text())
    content = cluster(FOUND)
    assert content["devices"][0]["count"] == 2
    assert content["links"]["inside_node"]["messages"] == {"latency_s": 1e-4, "bytes_per_s": 1.235e9}


def test_more_ranks_than_devices_are_refused():
    with pytest.raises(UsageError, match="1000 ranks, where there are"):
        probe(ProbeRequest(ranks=1000), Silent())


def test_a_file_that_is_there_is_not_replaced_and_nothing_is_measured(tmp_path, capsys):
    path = tmp_path / "cluster.yaml"
    path.write_text("mine")
    assert run(app, ["probe", "-o", str(path)]) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert run(app, ["probe", "-o", str(tmp_path / "no" / "cluster.yaml")]) == 2


@pytest.mark.slow
def test_the_command_measures_and_writes(tmp_path, capsys):
    path = tmp_path / "cluster.yaml"
    assert run(app, ["probe", "-o", str(path), "--ranks", "1", "-q"]) == 0
    assert "1 × " in capsys.readouterr().out
    assert "links" not in yaml.safe_load(path.read_text())
