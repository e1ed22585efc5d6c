"""What a machine can do, measured: numbers that make sense, and a file that says them."""

import time

import pytest
import torch

from llmopt.cli.app import app
from llmopt.cli.outcome import run
from llmopt.errors import UsageError
from llmopt.partition.cluster import load_cluster
from llmopt.partition.device import Attending, Speed
from llmopt.partition.work import product_s
from llmopt.pipeline.probing import blocks, compute, timing
from llmopt.pipeline.probing.blocks import Size, Stack
from llmopt.pipeline.probing.cluster_file import cluster, write_cluster
from llmopt.pipeline.probing.compute import (
    Compute,
    Multiplied,
    Rest,
    _speed,
    block_kinds,
    block_seconds,
    computing,
    kinds,
    product_seconds,
)
from llmopt.pipeline.probing.fit import fitted, per_second
from llmopt.pipeline.probing.links import LARGE_BYTES, SMALL_BYTES, Link, Turns, in_turns, line
from llmopt.pipeline.probing.probe import DeviceProbe, Kept, Probe, ProbeRequest, probe
from llmopt.pipeline.probing.timing import medians
from llmopt.progress import Silent

FOUND = Probe(
    ranks=2,
    device=DeviceProbe(
        name="a core",
        is_gpu=False,
        memory_bytes=10**9,
        process_bytes=10**8,
        compute=Compute(
            speeds={
                "float32": Speed(
                    tflops=0.05,
                    gb_per_s=10,
                    row_ns=100,
                    packing_gb_per_s=8,
                    call_us=3,
                    factors=[(2, 1.5)],
                    row_factors=[(512, 1.2)],
                    size_factors=[(33.6, 1.3)],
                )
            },
            rest=Rest(launch_s=1e-4, passing_bytes_per_s=2e10, attention=Attending(tflops=0.04, gb_per_s=7)),
        ),
        kept=Kept(many=0.9, one=1.0, waking_s=3e-4),
    ),
    messages=Link(latency_s=1e-4, bytes_per_s=1.23456e9),
    sums=Link(latency_s=2e-4, bytes_per_s=1e9),
)


def test_a_device_is_measured_in_every_kind_that_it_computes_with(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    for module in (blocks, compute):
        monkeypatch.setattr(module, "BEYOND_CACHES_BYTES", 1 << 22)
    monkeypatch.setattr(compute, "SHAPES", compute.SHAPES[:-1])
    device, size = torch.device("cpu"), Size(width=256, heads=4, kv_heads=2, inner=512)
    found = computing(
        dict(product_seconds(device)),
        dict(block_seconds({(kind, size): Stack(size, kind, device) for kind in block_kinds(device)})),
        dict.fromkeys(kinds(device), 0.5),
    )
    assert tuple(found.speeds) == kinds(device)
    for speed in found.speeds.values():
        assert 1e8 < speed.flops < 1e14
        assert 1e7 < speed.bytes_per_s < 1e13
        assert speed.slack == 0.5
        assert speed.block_factor(1) >= 0.5
    assert 0 <= found.rest.launch_s < 1
    assert 1e8 < 1e12 * found.rest.attention.tflops < 1e15


def multiplied(speed, slower=lambda case: 1.0):
    cases = [
        Multiplied(kind="float32", rows=rows, columns=columns, tokens=tokens, weight_bytes=4 * rows * columns)
        for rows, columns in compute.SHAPES
        for tokens in compute.TOKENS
    ]
    return {case: product_s(case.product, speed) * slower(case) for case in cases}


def test_speeds_are_found_from_the_times_that_they_give():
    given = Speed(tflops=0.09, gb_per_s=20, row_ns=120, packing_gb_per_s=10, passing_gb_per_s=6, call_us=70)
    found = _speed(multiplied(given))
    for name in ("tflops", "gb_per_s", "row_ns", "packing_gb_per_s", "passing_gb_per_s", "call_us"):
        assert getattr(found, name) == pytest.approx(getattr(given, name), rel=1e-3)
    assert [tokens for tokens, _ in found.factors] == list(compute.TOKENS)
    for factors in (found.factors, found.row_factors, found.size_factors):
        assert [factor for _, factor in factors] == pytest.approx([1.0] * len(factors), rel=1e-3)


@pytest.mark.parametrize(
    "slower",
    [
        pytest.param(lambda case: 1.5 if case.tokens == 2 else 1.0, id="two tokens"),
        pytest.param(lambda case: 1.4 if case.tokens > 1 and case.rows > 10_000 else 1.0, id="several, large weights"),
        pytest.param(lambda case: 1.3 if case.tokens == 1 and case.columns == 2048 else 1.0, id="one, long rows"),
    ],
)
def test_what_speeds_do_not_explain_is_a_factor(slower):
    times = multiplied(Speed(tflops=0.09, gb_per_s=20, packing_gb_per_s=10), slower)
    found = _speed(times)
    for case, seconds in times.items():
        assert product_s(case.product, found) == pytest.approx(seconds, rel=0.1)


def test_a_sweep_that_was_disturbed_counts_nothing():
    assert medians({"product": seconds} for seconds in (1.0, 5.0, 1.1, 0.9, 4.0)) == {"product": 1.1}


def test_ranks_work_in_turns_and_say_how_long_a_message_was_under_way(monkeypatch):
    class Other:
        """Another rank, that takes no time."""

        @staticmethod
        def barrier():
            pass

        @staticmethod
        def send(values, rank):
            pass

        @staticmethod
        def recv(values, rank):
            sent_s = time.perf_counter()
            time.sleep(0.001)
            values.fill_(sent_s)

    monkeypatch.setattr("llmopt.pipeline.probing.links.dist", Other)
    for rank in (0, 1):
        turns = in_turns(lambda: [3.0, 2.0, 1.5], rank, torch.device("cpu"))
        assert turns.waking_s == pytest.approx(2.0)
        assert turns.message_s >= 0.001
    only_two = in_turns(lambda: [3.0, 2.0, 1.5], 2, torch.device("cpu"))
    assert only_two == Turns(waking_s=0, message_s=0)


def test_what_explains_nothing_costs_nothing():
    costs = fitted({"a": [1.0, 2.0, 3.0], "b": [1.0, 1.0, 1.0]}, [2.0, 4.0, 6.0])
    assert costs["a"] == pytest.approx(2)
    assert per_second(0.0) is None
    assert costs["b"] == pytest.approx(0, abs=1e-9)


def test_a_link_is_a_line_through_two_sizes():
    found = line({size_bytes: 0.001 + size_bytes / 2e9 for size_bytes in (SMALL_BYTES, LARGE_BYTES)})
    assert found.latency_s == pytest.approx(0.001)
    assert found.bytes_per_s == pytest.approx(2e9)
    assert line({SMALL_BYTES: 0.001, LARGE_BYTES: 0.001}).latency_s == pytest.approx(0.001)


def test_the_cluster_file_says_what_was_found_beside_others(tmp_path):
    path = tmp_path / "cluster.yaml"
    write_cluster(cluster(FOUND), path)
    read = load_cluster(path)
    assert read == cluster(FOUND)
    device = read.device_class("cpu")
    assert device.speeds["float32"].flops == pytest.approx(5e10)
    assert device.speeds["float32"].bytes_per_s == pytest.approx(1e10)
    assert device.speeds["float32"].packing_gb_per_s == pytest.approx(8)
    assert device.attention == Attending(tflops=0.04, gb_per_s=7)
    assert (device.passing_gb_per_s, device.shared, device.shared_token) == (pytest.approx(20), pytest.approx(0.9), 1)
    assert device.waking_s == pytest.approx(3e-4)
    assert device.expands
    assert device.usable_bytes == pytest.approx(9e8)
    assert device.launch_s == pytest.approx(1e-4)
    assert len(read.all_devices()) == 2
    node = read.nodes[0]
    assert node.link.seconds(0) == pytest.approx(1e-4)
    assert node.sums.seconds(1e9) == pytest.approx(1 + 2e-4)


def test_more_ranks_than_devices_are_refused():
    with pytest.raises(UsageError, match="1000 ranks, where there are"):
        probe(ProbeRequest(ranks=1000), Silent())


def test_a_file_that_is_there_is_not_replaced_and_nothing_is_measured(tmp_path, capsys):
    path = tmp_path / "cluster.yaml"
    path.write_text("mine")
    assert run(app, ["probe", "-o", str(path)]) == 3
    assert "--force replaces it" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert run(app, ["probe", "-o", str(tmp_path / "no" / "cluster.yaml")]) == 3


@pytest.mark.slow
def test_the_command_measures_and_writes(tmp_path, capsys):
    path = tmp_path / "cluster.yaml"
    assert run(app, ["probe", "-o", str(path), "--ranks", "1", "-q"]) == 0
    assert "1 × " in capsys.readouterr().out
    assert len(load_cluster(path).all_devices()) == 1
