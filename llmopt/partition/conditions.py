"""The best stages that keep bounds on other metrics, or the cheapest that do, for devices in an order or in any.

What it decides is exact. Where the ways are too many for it, the caller is told what nothing can be below.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmopt.partition.cluster import Device
from llmopt.partition.compromise import Compromise, Measure
from llmopt.partition.machine import Machine, Metric
from llmopt.partition.nodes import nodes_of
from llmopt.partition.orders import Solution
from llmopt.partition.problem import Array, Kind, Objective, Piece
from llmopt.partition.steps import Steps, steps_in_order

Bounds = Mapping[Metric, float]  # in seconds
Tolls = Mapping[str, float]  # what a device of a class costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best there is, if any; None together with a bound that is not infinite: nobody knows."""

    solution: Solution | None
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ways:
    """A graph of steps, what each takes into use, and how stages on it become stages on devices."""

    machine: Machine
    steps: Steps
    kind_of: Sequence[int | None]
    degree: Sequence[int]
    devices: Sequence[Device | None]  # the first that each step takes, or one like it
    kinds: Callable[[Metric], Sequence[Kind]]
    laid_out: Callable[[Sequence[Piece]], tuple[tuple[Device, ...], tuple[Piece, ...]]]

    def hops(self, metric: Metric) -> Array:
        """To the devices of each step."""
        hops = [self.machine.hops_s(metric, device.node) if device else (0.0, 0.0) for device in self.devices]
        return np.array([hop[0 if step.near else 1] for hop, step in zip(hops, self.steps.every, strict=True)])


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
    ways = _in_order(machine, devices) if in_order else _in_any_order(machine, devices)
    if ways is None:
        return Found(solution=None, bound=0.0)
    measures = _measures(ways, target, bounds, at_most)
    metric: Metric = target if isinstance(target, str) else "tpot"
    compromise = Compromise(
        steps=ways.steps, kinds=ways.kinds(metric), kind_of=ways.kind_of, degree=ways.degree, measures=measures
    )
    if not compromise.affordable:
        return Found(solution=None, bound=0.0)
    alone = _alone(ways, target, bounds)
    pieces, bound = compromise.solve()
    if pieces is None:
        proven = alone is not None and alone.value <= bound
        return Found(solution=alone if proven else None, bound=bound if alone is None else min(bound, alone.value))
    if alone is not None and alone.value <= bound:
        return Found(solution=alone, bound=alone.value)
    order, placed = ways.laid_out(pieces)
    return Found(solution=Solution(devices=order, pieces=placed, value=bound, bound=bound), bound=bound)


def _measures(ways: _Ways, target: Metric | Tolls, bounds: Bounds, at_most: float) -> list[Measure]:
    """The target first."""
    metrics = dict(bounds)
    nothing = np.zeros(len(ways.steps.every))
    if isinstance(target, str):
        metrics = {target: min(at_most, bounds.get(target, math.inf))} | {
            metric: bound for metric, bound in bounds.items() if metric != target
        }
        first = []
    else:
        tolls = [
            target[device.kind] * many if device else 0.0
            for device, many in zip(ways.devices, ways.degree, strict=True)
        ]
        times = [np.zeros_like(kind.time) for kind in ways.kinds("tpot")]
        priced = Objective(form="rounds")
        first = [Measure(objective=priced, times=times, hops=nothing, tolls=np.array(tolls), at_most=at_most)]
    return first + [
        Measure(
            objective=ways.machine.objective(metric),
            times=[kind.time for kind in ways.kinds(metric)],
            hops=ways.hops(metric),
            tolls=nothing,
            at_most=bound,
        )
        for metric, bound in metrics.items()
    ]


def _alone(ways: _Ways, target: Metric | Tolls, bounds: Bounds) -> Solution | None:
    """The best plan of one stage that keeps the bounds."""
    found = []
    for number, (step, kind) in enumerate(zip(ways.steps.every, ways.kind_of, strict=True)):
        begins = step.before == 0 if isinstance(step.taken, tuple) else not step.near
        if kind is None or not begins:
            continue
        values = {metric: _worth(ways, metric, kind) for metric in ("ttft", "tpot", "throughput")}
        if any(values[metric] > bound * (1 + 1e-12) for metric, bound in bounds.items()):
            continue
        device = ways.devices[number]
        assert device is not None
        value = values[target] if isinstance(target, str) else target[device.kind] * ways.degree[number]
        if math.isfinite(values["tpot"]):
            found.append((value, number, kind))
    if not found:
        return None
    value, number, kind = min(found)
    items = ways.kinds("tpot")[kind].items
    order, placed = ways.laid_out([Piece(number, ways.degree[number], kind, 0, items)])
    return Solution(devices=order, pieces=placed, value=value, bound=value)


def _worth(ways: _Ways, metric: Metric, kind: int) -> float:
    seconds = ways.kinds(metric)[kind].alone()
    return ways.machine.objective(metric).value(seconds, seconds)


def _in_order(machine: Machine, devices: Sequence[Device]) -> _Ways | None:
    _, slots = machine.slots(devices, "tpot")
    steps = steps_in_order(slots)
    degrees = []
    for step in steps.every:
        assert isinstance(step.taken, int)
        options = {kind: degree for degree, kind in slots[step.taken].options}
        degrees.append(options[step.option] if step.option is not None else 0)
    places = [int(step.taken) if isinstance(step.taken, int) else 0 for step in steps.every]

    def laid_out(pieces: Sequence[Piece]) -> tuple[tuple[Device, ...], tuple[Piece, ...]]:
        return tuple(devices), tuple(piece._replace(slot=places[piece.slot]) for piece in pieces)

    return _Ways(
        machine=machine,
        steps=steps,
        kind_of=[step.option for step in steps.every],
        degree=degrees,
        devices=[
            devices[place] if step.option is not None else None for place, step in zip(places, steps.every, strict=True)
        ],
        kinds=lambda metric: machine.slots(devices, metric)[0],
        laid_out=laid_out,
    )


def _in_any_order(machine: Machine, devices: Sequence[Device]) -> _Ways | None:
    nodes = nodes_of(machine, devices)
    steps = nodes.steps() if nodes.options else None
    if steps is None:
        return None
    options = [nodes.options[step.option] for step in steps.every if step.option is not None]
    return _Ways(
        machine=machine,
        steps=steps,
        kind_of=[step.option for step in steps.every],
        degree=[option.degree for option in options],
        devices=[nodes.device(option) for option in options],
        kinds=nodes.kinds,
        laid_out=lambda pieces: nodes.laid_out(steps, pieces),
    )
