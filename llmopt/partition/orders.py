"""The best stages for the devices of one replica, in a given order or in any.

All orders are gone through where there are few enough ways (`steps`). Else devices count by class (`by_class`), and the
bound says how far from the best that can be.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmopt.partition.by_class import least_possible, likely_orders, raised_bound
from llmopt.partition.cluster import Device
from llmopt.partition.machine import Machine, Metric
from llmopt.partition.nodes import Nodes, nodes_of
from llmopt.partition.problem import Piece
from llmopt.partition.solver.fixed import FixedOrder
from llmopt.partition.solver.joining import JOINED, best
from llmopt.partition.ways import Ways, ways_in_any_order, ways_in_order

_FEW_STEPS = 300  # so few are gone through at once
_CLOSE = 1e-4  # relative: so near to the bound, no more orders are tried
PROVEN = 1e-8  # relative: a bound that is nearer than that is reached


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Stages on an order of devices, what they are worth in seconds, and what nothing is below."""

    devices: tuple[Device, ...]
    pieces: tuple[Piece, ...]
    value: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best there is, or that was found, and what nothing is below.

    None with an infinite bound: it is proven that there is nothing; with another: nobody knows.
    """

    solution: Solution | None
    bound: float


NOTHING_FITS = Found(solution=None, bound=math.inf)


def solve_order(
    machine: Machine,
    devices: Sequence[Device],
    metric: Metric,
    at_most: float = math.inf,
    *,
    exact: bool = True,
    tolerance: float = JOINED,
) -> Solution | None:
    """The best stages for one order; None where nothing fits, or nothing is below `at_most`.

    Without `exact`, a node that is left and comes again counts as another, which is quicker to search; `tolerance` is
    that of `best`.
    """
    kinds, slots = machine.slots(devices, metric)
    if not kinds:
        return None  # no node has a group of that many devices
    order, objective = FixedOrder(kinds=kinds, slots=slots), machine.objective(metric)
    found: list[Solution] = []
    if (alone := order.alone()) is not None:
        seconds = kinds[alone.kind].alone()
        value = objective.value(seconds, seconds)
        found.append(Solution(devices=tuple(devices), pieces=(alone,), value=value, bound=value))
    limit = min([at_most, *(one.value for one in found)])
    bound = math.inf
    if exact and len({slot.run for slot in slots}) > len({device.node for device in devices}):
        # A node comes again: how far its next device is depends on whether those in between are left out.
        if (ways := ways_in_order(machine, devices)) is not None:
            return _least([*found, *_along(ways, metric, limit)], bound)
        bound = least_possible(machine, devices, metric)
    pieces = best(order, objective, limit, tolerance)
    if pieces is not None:
        each = order.seconds(pieces)
        value = objective.value(sum(each), max(each))
        found.append(Solution(devices=tuple(devices), pieces=tuple(pieces), value=value, bound=value))
    return _least(found, bound)


def solve_any_order(machine: Machine, devices: Sequence[Device], metric: Metric, at_most: float = math.inf) -> Found:
    """The best stages for any order of devices, as far as there is something below `at_most`."""
    nodes = nodes_of(machine, devices)
    if not nodes.options:
        return NOTHING_FITS  # no node has a group of that many devices
    alone = _alone(nodes, metric)
    limit = min(at_most, alone.value) if alone is not None else at_most
    ways = ways_in_any_order(machine, devices)
    likely = Found(solution=None, bound=0.0)
    if ways is None or len(ways.steps.every) > _FEW_STEPS:
        likely = _by_class(machine, devices, metric, limit)
        limit = min(limit, likely.solution.value) if likely.solution is not None else limit
    found = [one for one in (alone, likely.solution) if one is not None]
    if likely.bound >= limit * (1 - PROVEN):
        bound = limit  # nothing else is below what there is, or below what was asked for
    elif ways is not None:
        found, bound = [*found, *_along(ways, metric, limit)], math.inf
    else:
        bound = likely.bound
    least = _least(found, bound)
    if least is not None:
        return Found(solution=least, bound=least.bound)
    return Found(solution=None, bound=bound if bound < at_most else math.inf)


def _by_class(machine: Machine, devices: Sequence[Device], metric: Metric, at_most: float) -> Found:
    """The best of orders that are likely to be good, and what nothing in any order is below."""
    likely = likely_orders(machine, devices, metric, at_most)
    best_yet, limit, bound, raised_for = None, at_most, likely.bound, math.inf
    for order in likely.orders:
        if bound >= limit * (1 - _CLOSE):
            break
        cut = solve_order(machine, order, metric, limit, exact=False, tolerance=_CLOSE)
        if cut is not None and (best_yet is None or cut.value < best_yet.value):
            first, best_yet, limit = best_yet is None, cut, min(limit, cut.value)
            if first:
                bound, raised_for = raised_bound(machine, devices, metric, bound=bound, value=limit), limit
    if best_yet is not None and bound < limit * (1 - PROVEN):
        finer = solve_order(machine, best_yet.devices, metric, limit, exact=False)
        best_yet = finer if finer is not None and finer.value < limit else best_yet
        limit = best_yet.value
    if bound < limit * (1 - PROVEN) and limit < raised_for * (1 - _CLOSE) and math.isfinite(limit):
        bound = raised_bound(machine, devices, metric, bound=bound, value=limit)
    return Found(solution=best_yet, bound=bound)


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


def _along(ways: Ways, metric: Metric, at_most: float) -> list[Solution]:
    """The best stages of all ways, if there are any."""
    problem, objective = ways.stepwise(metric), ways.machine.objective(metric)
    pieces = best(problem, objective, at_most)
    if pieces is None:
        return []
    seconds = problem.seconds(pieces)
    value = objective.value(sum(seconds), max(seconds))
    devices, placed = ways.placed(pieces)
    return [Solution(devices=devices, pieces=placed, value=value, bound=value)]
