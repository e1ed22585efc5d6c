"""Every plan that the cost model allows for a small model on a small cluster, one after another; and random cases.

Slow, and obviously right: no symmetry, no bound, no table; every device in every order, every group, every cut.
"""

import itertools
import random

from llmopt.model.families import spec_from_config
from llmopt.partition.cluster import cluster_from_json
from llmopt.partition.cost import Precision
from llmopt.partition.plan import Workload
from llmopt.partition.problem import Piece
from llmopt.partition.search import Search
from llmopt.partition.settings import Settings
from llmopt.partition.wanted import Model, Wanted

METRICS = ("ttft_ms", "tpot_ms", "throughput_tokens_per_s")


def random_search(seed, *, devices=4, wanted=None):
    """A model of a few blocks, and a cluster of up to three classes, some of which are short of memory."""
    draw = random.Random(seed)
    heads = draw.choice([2, 4, 6])
    config = {
        "model_type": "llama",
        "vocab_size": draw.choice([64, 600, 3000]),
        "hidden_size": 16 * heads,
        "head_dim": 16,
        "intermediate_size": 24 * heads,
        "num_hidden_layers": draw.randint(1, 5),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, heads]),
        "max_position_embeddings": 512,
        "tie_word_embeddings": draw.random() < 0.5,
        "torch_dtype": "float32",
    }
    spec = spec_from_config(config)
    workload = Workload(prompt=draw.choice([2, 16, 60]), output=draw.choice([2, 20]), batch=draw.choice([1, 1, 2, 4]))
    model = Model(name="tiny", spec=spec, precision=Precision(dtype="float32", schemes={}))
    return Search(
        model=model,
        cluster=_cluster(draw, _bytes(spec), devices),
        workload=workload,
        wanted=wanted or Wanted(objective=draw.choice(["ttft", "tpot", "throughput"])),
    )


def _bytes(spec):
    return (
        4 * sum(linear.weight.count for block in spec.blocks for linear in block.linears()) + 8 * spec.head.weight.count
    )


def _cluster(draw, size, most):
    kinds = {
        f"k{number}": {
            "memory_gb": size * draw.choice([0.4, 0.6, 0.9, 2.0, 9.0]) / 1e9,
            "launch_us": draw.choice([0, 2]),
            "waking_us": draw.choice([0, 0, 40]),
            "price_per_hour": draw.choice([1, 2, 3.5]),
            "speeds": {"float32": {"tflops": draw.choice([0.001, 0.002, 0.01]), "gb_per_s": draw.choice([0.5, 1, 4])}},
        }
        for number in range(draw.randint(1, 3))
    }
    nodes, left = [], draw.randint(1, most)
    while left > 0:
        held = dict.fromkeys(draw.sample(sorted(kinds), draw.randint(1, min(2, len(kinds)))), 1)
        if draw.random() < 0.5:
            held[next(iter(held))] = 2
        count = 2 if draw.random() < 0.3 else 1
        left -= count * sum(held.values())
        if left < 0 and nodes:
            break
        link = {"latency_us": draw.choice([0, 5, 60]), "gb_per_s": draw.choice([0.1, 1, 10])}
        sums = {"latency_us": 3, "gb_per_s": 1} if draw.random() < 0.2 else None
        nodes.append({"name": f"n{len(nodes)}", "count": count, "devices": held, "link": link, "sums": sums})
    between = {"latency_us": draw.choice([5, 100]), "gb_per_s": draw.choice([0.05, 1])}
    return cluster_from_json({"schema": "llmopt.cluster/1", "devices": kinds, "nodes": nodes, "between": between})


def every_plan(search):
    """(predicted, devices in use of all replicas) of every plan that fits, under every setting of the search."""
    settings = Settings(model=search.model, cluster=search.cluster, workload=search.workload, wanted=search.wanted)
    devices = settings.devices()
    for setting in settings.each(devices, settings.degrees(devices)):
        yield from _plans_of(setting.machine, setting.devices, in_order=search.wanted.order is not None)


def _plans_of(machine, devices, *, in_order):
    items = machine.costs.items
    for groups in _groups(machine, list(devices), in_order=in_order):
        order = [device for group in groups for device in group]
        for inner in itertools.combinations(range(1, items), len(groups) - 1):
            ends, slot, pieces = (0, *inner, items), 0, []
            for group, first, stop in zip(groups, ends, ends[1:], strict=False):
                pieces.append(Piece(slot, len(group), 0, first, stop))
                slot += len(group)
            stages = machine.stages(order, pieces)
            if machine.fits(stages):
                yield machine.predicted(stages), order * machine.replicas


def _groups(machine, left, *, in_order, depth=0):
    """Every sequence of groups, one stage each: a stage has an item."""
    if depth == machine.costs.items:
        return
    for place, device in enumerate(left):
        for degree in machine.degrees:
            alike = [one for one in left if (one.kind, one.node) == (device.kind, device.node)]
            group = left[place : place + degree] if in_order else alike[:degree]
            if group[0] != device or len(group) < degree or any(one not in alike for one in group):
                continue
            rest = left[place + degree :] if in_order else [one for one in left if one not in group]
            yield [group]
            for more in _groups(machine, rest, in_order=in_order, depth=depth + 1):
                yield [group, *more]


def cost(search, predicted, devices):
    """What an objective makes of a plan."""
    name = search.wanted.objective
    if name == "devices":
        return len(devices)
    if name == "price":
        return sum(search.cluster.device_class(device.kind).price_per_hour for device in devices)
    return 1000 / predicted.throughput_tokens_per_s if name == "throughput" else getattr(predicted, f"{name}_ms")
