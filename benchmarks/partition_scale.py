"""How long the search for a plan takes, as models and clusters grow.

nice python -m benchmarks.partition_scale [--plot curve.png]
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable

import numpy as np

from llmopt.model.families import spec_from_config
from llmopt.model.spec import ModelSpec
from llmopt.partition.cluster import Cluster, cluster_from_json
from llmopt.partition.cost import Precision
from llmopt.partition.joint import choose_schemes
from llmopt.partition.plan import Workload
from llmopt.partition.problem import Kind, Slot
from llmopt.partition.promises import parse_promise
from llmopt.partition.search import Search
from llmopt.partition.solver.classes import AnyOrder, Grouping
from llmopt.partition.solver.fixed import FixedOrder
from llmopt.partition.solver.joining import smallest_largest
from llmopt.partition.wanted import Model, ObjectiveName, Wanted

NODES = [
    {"name": "a", "count": 2, "devices": {"h100-sxm": 8}, "link": {"latency_us": 5, "gb_per_s": 300}},
    {"name": "b", "count": 3, "devices": {"a100-80gb-sxm": 8}, "link": {"latency_us": 5, "gb_per_s": 200}},
    {"name": "c", "count": 6, "devices": {"l40s": 4}, "link": {"latency_us": 10, "gb_per_s": 25}},
]
SMALL = [
    {"name": "a", "devices": {"a100-80gb-sxm": 4}, "link": {"latency_us": 5, "gb_per_s": 200}},
    {"name": "b", "count": 2, "devices": {"l40s": 4}, "link": {"latency_us": 10, "gb_per_s": 25}},
]
NODES_BETWEEN = {"latency_us": 10, "gb_per_s": 40}


def llama(blocks: int, width: int = 16384) -> ModelSpec:
    """Shaped as Llama-3.1-405B, or as narrow as 70B, with so many blocks."""
    config = {"model_type": "llama", "vocab_size": 128256, "hidden_size": width}
    config |= {"intermediate_size": 53248 if width == 16384 else 28672}
    config |= {"num_hidden_layers": blocks, "num_attention_heads": width // 128, "num_key_value_heads": 8}
    return spec_from_config(config | {"max_position_embeddings": 131072, "torch_dtype": "bfloat16"})


def mixed() -> Cluster:
    """64 accelerators of three classes."""
    return cluster_from_json({"schema": "llmopt.cluster/1", "nodes": NODES, "between": NODES_BETWEEN})


def large() -> Cluster:
    """1,000 accelerators of three classes."""
    nodes = [node | {"count": count} for node, count in zip(NODES, (42, 42, 82), strict=True)]
    return cluster_from_json({"schema": "llmopt.cluster/1", "nodes": nodes, "between": NODES_BETWEEN})


def kinds(items: int, devices: int, speeds: tuple[float, ...]) -> list[Kind]:
    draw = random.Random(items)
    work = np.array([draw.uniform(0.5, 2) for _ in range(items)])
    size = np.array([draw.uniform(0.5, 2) for _ in range(items)])
    room = max(6 * items / devices, 8.0)
    sums = [np.concatenate([[0.0], np.cumsum(one)]) for one in (work, size)]
    return [Kind(time=sums[0] / speed, memory=sums[1], capacity=room * (0.6 + speed)) for speed in speeds]


def fixed_order(items: int, devices: int) -> None:
    draw = random.Random(devices)
    of_kind = kinds(items, devices, (0.3, 0.6, 1.0))
    slots = [
        Slot(options=((1, draw.randrange(3)),), run=place // 8, inside_s=0.01, between_s=0.05)
        for place in range(devices)
    ]
    assert smallest_largest(FixedOrder(kinds=of_kind, slots=slots)) is not None


def free_order(items: int, devices: int) -> None:
    counts = [devices // 3, devices // 3, devices - 2 * (devices // 3)]
    problem = AnyOrder(
        kinds=kinds(items, devices, (0.3, 0.6, 1.0)),
        groupings=[Grouping(place, 1, 1) for place in range(3)],
        counts=counts,
        hops_s=[0.05] * 3,
    )
    assert smallest_largest(problem) is not None


def joint(blocks: int) -> None:
    spec = llama(blocks)
    base = Precision(dtype="bfloat16", schemes={})
    precision = choose_schemes(spec, mixed(), Workload(prompt=2048, output=256, batch=64), base)
    model = Model(name="llama", spec=spec, precision=precision)
    workload = Workload(prompt=2048, output=256, batch=1)
    Search(model=model, cluster=mixed(), workload=workload, wanted=Wanted(objective="tpot")).plan()


def whole(objective: ObjectiveName, batch: int = 1, cluster: Cluster | None = None) -> float:
    """A 405B config on mixed accelerators, in any order; how far from the best it is at most."""
    model = Model(name="llama", spec=llama(126), precision=Precision(dtype="bfloat16", schemes={}))
    workload = Workload(prompt=2048, output=256, batch=batch)
    wanted = Wanted(objective=objective)
    plan = Search(model=model, cluster=cluster or mixed(), workload=workload, wanted=wanted).plan()
    assert plan.gap is not None
    return plan.gap


def promised() -> float:
    """12 accelerators in 3 nodes, in any order, for 80 blocks under two promises."""
    cluster = cluster_from_json({"schema": "llmopt.cluster/1", "nodes": SMALL, "between": NODES_BETWEEN})
    model = Model(name="llama", spec=llama(80, width=8192), precision=Precision(dtype="bfloat16", schemes={}))
    promises = (parse_promise("ttft_ms<=1300"), parse_promise("tpot_ms<=60"))
    wanted = Wanted(objective="throughput", promises=promises)
    workload = Workload(prompt=2048, output=256, batch=4)
    plan = Search(model=model, cluster=cluster, workload=workload, wanted=wanted).plan()
    assert plan.gap is not None
    return plan.gap


def timed(work: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    gap = work()
    return time.perf_counter() - start, gap


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", help="draw the curve to this file")
    asked = parser.parse_args()
    print(f"10,000 layers on 4,000 devices, fixed order: {seconds(lambda: fixed_order(10_000, 4_000)):.2f} s")
    print(f"128 layers on 1,000 devices of 3 classes, free order: {seconds(lambda: free_order(128, 1_000)):.2f} s")
    for objective, batch in itertools.product(("tpot", "ttft", "throughput"), (1, 64)):
        took, gap = timed(lambda objective=objective, batch=batch: whole(objective, batch))
        print(f"405B on 64 mixed accelerators, {objective}, batch {batch}: {took:.2f} s, gap {gap:.2g}")
    took, gap = timed(lambda: whole("tpot", cluster=large()))
    print(f"405B on 1,000 mixed accelerators, tpot, batch 1: {took:.2f} s, gap {gap:.2g}")
    took, gap = timed(promised)
    print(f"70B on 12 mixed accelerators, two promises: {took:.2f} s, gap {gap:.2g}")
    print(f"joint, 128 layers on 64 devices: {seconds(lambda: joint(128)):.2f} s")
    sizes = [250 * 2**step for step in range(6)]
    # The least of three: what else the machine does makes it slower, and never quicker.
    curve = [min(seconds(lambda size=size: fixed_order(size, size * 2 // 5)) for _ in range(3)) for size in sizes]
    for size, took in zip(sizes, curve, strict=True):
        print(f"{size:>6} layers on {size * 2 // 5:>5} devices: {took:.3f} s")
    if asked.plot:
        draw(asked.plot, sizes, curve)


def draw(path: str, sizes: list[int], curve: list[float]) -> None:
    from matplotlib.figure import Figure

    axes = Figure(layout="constrained").subplots()
    axes.loglog(sizes, curve, "o-", label="measured")
    axes.loglog(sizes, [curve[0] * size / sizes[0] for size in sizes], "--", label="linear")
    axes.set(xlabel="layers, on 0.4 devices each", ylabel="seconds")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.legend()
    axes.figure.savefig(path)


if __name__ == "__main__":
    main()
