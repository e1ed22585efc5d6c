"""An open order of more devices than can be gone through: orders that are likely to be good, and what nothing is below.

Where a device is, is left out at first: then devices of one class are alike (`classes`), and with the shortest hop
everywhere the best for them is a bound. What comes out is laid onto nodes, and is to be cut again for that order with
every degree allowed and the links that are really there.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from llmopt.partition.cluster import Device
from llmopt.partition.layout import by_permuted_class, laid_out
from llmopt.partition.machine import Machine, Metric
from llmopt.partition.pools import (
    classes_of,
    degreed_devices,
    degrees_by_class,
    in_nodes,
    pooled_devices,
    simple_bound,
)
from llmopt.partition.problem import Objective, Piece
from llmopt.partition.solver.classes import MOST_STATES, AnyOrder
from llmopt.partition.solver.joining import best, smallest_largest
from llmopt.partition.solver.prices import MOST_ITEMS, Prices

_MOST_POOLED = 3_000_000  # states × groupings
_MOST_SUMMED = 40_000_000  # the same × items, for a least sum
_MOST_JOINED = 100_000  # the same, where many least sums are asked for
_FEW_CHANGES = 3  # of prices, where a rough bound will do
_NEAR = 1e-6  # relative: what is cut again for the order that is found need not be exact


class Likely(NamedTuple):
    """Orders that are likely to be good, the likelier first, and the seconds that nothing in any order is below."""

    orders: Iterator[list[Device]]
    bound: float


def likely_orders(machine: Machine, devices: Sequence[Device], metric: Metric, at_most: float = math.inf) -> Likely:
    """Orders to cut, none where nothing can be below `at_most`."""
    objective = machine.objective(metric)
    pooled = pooled_devices(machine, devices, metric)
    bound = simple_bound(pooled, objective)
    if bound < at_most < math.inf and _small(pooled) and Prices(problem=pooled).are_above(objective, at_most):
        bound = at_most
    if bound >= at_most:
        return Likely(iter(()), bound)
    if pooled.states * len(pooled.kinds) > _MOST_POOLED:
        orders = (_by_degrees(machine, devices, metric, at_most) for _ in range(1))
        return Likely(chain(chain.from_iterable(orders), by_permuted_class(devices)), bound)
    found, lowest = _stages(pooled, objective, at_most)
    bound = max(bound, lowest)
    if bound >= at_most:
        return Likely(iter(()), bound)

    def orders_by_hop() -> Iterator[list[Device]]:
        for pieces in found:
            yield laid_out(_named(pooled, devices, pieces), devices)
        far = pooled_devices(machine, devices, metric, "longest")
        if far.hops_s != pooled.hops_s:
            for pieces in _stages(far, objective, math.inf)[0]:
                yield laid_out(_named(far, devices, pieces), devices)

    return Likely(chain(orders_by_hop(), by_permuted_class(devices)), bound)


def raised_bound(machine: Machine, devices: Sequence[Device], metric: Metric, *, bound: float, value: float) -> float:
    """A bound nearer to the value of what was found, if that can be proven."""
    pooled = pooled_devices(machine, devices, metric)
    return Prices(problem=pooled).raised(machine.objective(metric), bound, value) if _small(pooled) else bound


def _small(problem: AnyOrder) -> bool:
    return problem.kinds[0].items <= MOST_ITEMS


def least_possible(machine: Machine, devices: Sequence[Device], metric: Metric) -> float:
    """Seconds that nothing is below, at once; infinite where there is no group of devices."""
    if not any(degree <= many for degree in machine.degrees for many in in_nodes(devices).values()):
        return math.inf
    pooled = pooled_devices(machine, devices, metric)
    objective, alone = machine.objective(metric), [kind.alone() for kind in pooled.kinds]
    bound = simple_bound(pooled, objective)
    if _small(pooled) and (objective.form == "rounds" or objective.micro_batches == 1):
        bound = Prices(problem=pooled, changes=_FEW_CHANGES).from_below(objective, bound)
    return min([bound, *(objective.value(one, one) for one in alone)])


def _named(problem: AnyOrder, devices: Sequence[Device], pieces: Sequence[Piece]) -> list[tuple[str, int]]:
    """The class of each stage, and how many devices it has."""
    classes = classes_of(devices)
    return [(classes[problem.groupings[piece.kind].place], piece.degree) for piece in pieces]


def _stages(problem: AnyOrder, objective: Objective, at_most: float) -> tuple[list[list[Piece]], float]:
    """Stages, of which some are likely to be good; and what none is below."""
    if objective.only_largest(problem.most_stages) or _can_join(problem, objective):
        pieces = best(problem, objective, at_most)
        if pieces is None:
            return [], at_most
        seconds = problem.seconds(pieces)
        return [pieces], objective.value(sum(seconds), max(seconds))
    small = smallest_largest(problem, at_most / objective.micro_batches, _NEAR)
    if small is None:
        return [], at_most
    total = sum(np.array([np.diff(kind.time) for kind in problem.kinds]).min(axis=0))
    if objective.value(float(total), small[1]) >= at_most:
        return [small[0]], at_most
    # The least sum and the smallest largest, if no stages have both, are still a bound.
    summed = problem.least_sum() if _cells(problem) <= _MOST_SUMMED and problem.can_sum else None
    least = summed[1] if summed is not None else 0.0
    found = [small[0], *([summed[0]] if summed is not None else [])]
    return found, objective.value(least, small[1] * (1 - 2 * _NEAR))


def _cells(problem: AnyOrder) -> int:
    return problem.states * len(problem.kinds) * problem.kinds[0].items


def _can_join(problem: AnyOrder, objective: Objective) -> bool:
    most = _MOST_SUMMED if objective.micro_batches == 1 else _MOST_JOINED
    return _cells(problem) <= most and problem.can_sum


def _by_degrees(machine: Machine, devices: Sequence[Device], metric: Metric, at_most: float) -> list[list[Device]]:
    """Each class with one degree at a time: fewer states, and no bound. The best of them is laid out."""
    objective = machine.objective(metric)
    chosen: tuple[float, list[tuple[str, int]]] | None = None
    problems = [degreed_devices(machine, devices, metric, degrees) for degrees in degrees_by_class(machine, devices)]
    # The small ones are quick, and what they find rules most of the others out.
    for problem in sorted(problems, key=lambda one: one.states):
        if problem.states > MOST_STATES or simple_bound(problem, objective) >= at_most:
            continue
        found = smallest_largest(problem, at_most / objective.micro_batches, _NEAR)
        if found is None:
            continue
        seconds = problem.seconds(found[0])
        value = objective.value(sum(seconds), max(seconds))
        if chosen is None or value < chosen[0]:
            chosen, at_most = (value, _named(problem, devices, found[0])), min(at_most, value)
    return [laid_out(chosen[1], devices)] if chosen is not None else []
