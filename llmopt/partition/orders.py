"""The best stages for the devices of one replica, in a given order or in any.

An open order is gone through exactly, node by node, where there are few enough ways (`nodes`). Else devices count by
class (`by_class`), and the bound says how far from the best that can be.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmopt.partition.by_class import likely_orders
from llmopt.partition.cluster import Device
from llmopt.partition.fixed import FixedOrder
from llmopt.partition.joining import best
from llmopt.partition.machine import Machine, Metric
from llmopt.partition.nodes import Nodes, nodes_of
from llmopt.partition.problem import Piece
from llmopt.partition.steps import Steps

_FEW_STEPS = 300  # so few are gone through at once
PROVEN = 1e-8  # relative: a bound that is nearer than that is reached


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Stages on an order of devices, what they are worth in seconds, and what nothing is below."""

    devices: tuple[Device, ...]
    pieces: tuple[Piece, ...]
    value: float
    bound: float


def solve_order(
    machine: Machine, devices: Sequence[Device], metric: Metric, at_most: float = math.inf
) -> Solution | None:
    """The best stages for one order; None where nothing fits, or nothing is below `at_most`."""
    kinds, slots = machine.slots(devices, metric)
    if not kinds:
        return None  # no node has a group of that many devices
    order, objective = FixedOrder(kinds=kinds, slots=slots), machine.objective(metric)
    found: list[tuple[float, tuple[Piece, ...]]] = []
    if (alone := order.alone()) is not None:
        seconds = kinds[alone.kind].alone()
        found.append((objective.value(seconds, seconds), (alone,)))
    pieces = best(order, objective, min(at_most, found[0][0] if found else math.inf))
    if pieces is not None:
        each = order.seconds(pieces)
        found.append((objective.value(sum(each), max(each)), tuple(pieces)))
    if not found:
        return None
    value, chosen = min(found)
    return Solution(devices=tuple(devices), pieces=chosen, value=value, bound=value)


def solve_any_order(
    machine: Machine, devices: Sequence[Device], metric: Metric, at_most: float = math.inf
) -> Solution | None:
    """The best stages for any order of devices; None where nothing fits, or nothing is below `at_most`."""
    nodes = nodes_of(machine, devices)
    if not nodes.options:
        return None  # no node has a group of that many devices
    found = [one for one in [_alone(nodes, metric)] if one is not None]
    steps = nodes.steps()
    limit = min([at_most, *(one.value for one in found)])
    if steps is None or len(steps.every) > _FEW_STEPS:
        likely = likely_orders(machine, devices, metric, limit)
        cut = (solve_order(machine, order, metric, limit) for order in likely.orders)
        found += [one for one in cut if one is not None]
        bound = min([likely.bound, *(one.value for one in found)])
        if steps is None or likely.bound >= min([at_most, *(one.value for one in found)]) * (1 - PROVEN):
            return _least(found, bound)
        limit = min([at_most, *(one.value for one in found)])
    found += [one for one in [_solve_nodes(nodes, steps, metric, limit)] if one is not None]
    return _least(found, math.inf)


def _least(found: Sequence[Solution], bound: float) -> Solution | None:
    least = min(found, key=lambda one: one.value, default=None)
    return replace(least, bound=min(bound, least.value)) if least is not None else None


def _alone(nodes: Nodes, metric: Metric) -> Solution | None:
    """The best plan of one stage."""
    objective = nodes.machine.objective(metric)
    found = []
    for number, (option, kind) in enumerate(zip(nodes.options, nodes.kinds(metric), strict=True)):
        seconds = kind.alone()
        if math.isfinite(seconds):
            found.append((objective.value(seconds, seconds), number, option, kind))
    if not found:
        return None
    value, number, option, kind = min(found, key=lambda one: one[:2])
    devices = nodes.devices[option.site][0][option.place][: option.degree]
    pieces = (Piece(0, option.degree, number, 0, kind.items),)
    return Solution(devices=devices, pieces=pieces, value=value, bound=value)


def _solve_nodes(nodes: Nodes, steps: Steps, metric: Metric, at_most: float) -> Solution | None:
    order, objective = nodes.free_order(steps, metric), nodes.machine.objective(metric)
    pieces = best(order, objective, at_most)
    if pieces is None:
        return None
    seconds = order.seconds(pieces)
    value = objective.value(sum(seconds), max(seconds))
    devices, placed = nodes.laid_out(steps, pieces)
    return Solution(devices=devices, pieces=placed, value=value, bound=value)
