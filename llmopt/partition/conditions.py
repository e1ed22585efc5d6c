"""The best stages that keep bounds on other metrics, or the cheapest that do, for devices in an order or in any.

What it decides is exact. Where the ways are too many for it, the caller is told what nothing can be below.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from llmopt.partition.cluster import Device
from llmopt.partition.machine import Machine, Metric
from llmopt.partition.orders import Found, Solution
from llmopt.partition.problem import Objective, Piece
from llmopt.partition.solver.ahead import Ahead, Measure
from llmopt.partition.solver.compromise import Compromise
from llmopt.partition.ways import Ways, ways_in_any_order, ways_in_order

Bounds = Mapping[Metric, float]  # in seconds
Tolls = Mapping[str, float]  # what a device of a class costs


def solve_under(
    machine: Machine,
    devices: Sequence[Device],
    target: Metric | Tolls,
    bounds: Bounds,
    *,
    in_order: bool,
    at_most: float = math.inf,
) -> Found:
    """The least target among plans that keep the bounds, below `at_most` or not at all."""
    ways = (ways_in_order if in_order else ways_in_any_order)(machine, devices)
    if ways is None:
        return Found(solution=None, bound=0.0)
    measures = _measures(ways, target, bounds, at_most)
    metric: Metric = target if isinstance(target, str) else "tpot"
    ahead = Ahead(steps=ways.steps, kinds=ways.kinds(metric), kind_of=ways.kind_of, measures=measures)
    if not ahead.affordable:
        return Found(solution=None, bound=0.0)
    alone = _alone(ways, target, bounds)
    pieces, bound = Compromise(ahead=ahead, degrees=ways.degrees).solve()
    if pieces is None:
        proven = alone is not None and alone.value <= bound
        return Found(solution=alone if proven else None, bound=bound if alone is None else min(bound, alone.value))
    if alone is not None and alone.value <= bound:
        return Found(solution=alone, bound=alone.value)
    order, placed = ways.placed(pieces)
    return Found(solution=Solution(devices=order, pieces=placed, value=bound, bound=bound), bound=bound)


def _measures(ways: Ways, target: Metric | Tolls, bounds: Bounds, at_most: float) -> list[Measure]:
    """The target first."""
    metrics = dict(bounds)
    nothing = np.zeros(len(ways.steps.every))
    if isinstance(target, str):
        metrics = {target: min(at_most, bounds.get(target, math.inf))} | {
            metric: bound for metric, bound in bounds.items() if metric != target
        }
        first = []
    else:
        tolls = [target[device.kind] * many for device, many in zip(ways.devices, ways.degrees, strict=True)]
        times = [np.zeros_like(kind.time) for kind in ways.kinds("tpot")]
        priced = Objective(form="rounds")
        first = [Measure(objective=priced, times=times, hops=nothing, tolls=np.array(tolls), at_most=at_most)]
    return first + [
        Measure(
            objective=ways.machine.objective(metric),
            times=[kind.time for kind in ways.kinds(metric)],
            hops=ways.hops_s(metric),
            tolls=nothing,
            at_most=bound,
        )
        for metric, bound in metrics.items()
    ]


def _alone(ways: Ways, target: Metric | Tolls, bounds: Bounds) -> Solution | None:
    """The best plan of one stage that keeps the bounds."""
    found = []
    for number, (step, kind) in enumerate(zip(ways.steps.every, ways.kind_of, strict=True)):
        if step.before:
            continue
        values = {metric: _worth(ways, metric, kind) for metric in ("ttft", "tpot", "throughput")}
        if any(values[metric] > bound * (1 + 1e-12) for metric, bound in bounds.items()):
            continue
        device = ways.devices[number]
        value = values[target] if isinstance(target, str) else target[device.kind] * ways.degrees[number]
        if math.isfinite(values["tpot"]):
            found.append((value, number, kind))
    if not found:
        return None
    value, number, kind = min(found)
    items = ways.kinds("tpot")[kind].items
    order, placed = ways.placed([Piece(number, ways.degrees[number], kind, 0, items)])
    return Solution(devices=order, pieces=placed, value=value, bound=value)


def _worth(ways: Ways, metric: Metric, kind: int) -> float:
    seconds = ways.kinds(metric)[kind].alone()
    return ways.machine.objective(metric).value(seconds, seconds)
