"""An open order of more devices than can be gone through: orders that are likely to be good, and what nothing is below.

Where a device is, is left out at first: then devices of one class are alike (`classes`), and with the shortest hop
everywhere the best for them is a bound. What comes out is laid onto nodes, and is to be cut again for that order with
every degree allowed and the links that are really there.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, product
from typing import NamedTuple

import numpy as np

from llmopt.partition.classes import MOST_STATES, AnyOrder, Grouping
from llmopt.partition.cluster import Device
from llmopt.partition.joining import best, smallest_largest
from llmopt.partition.layout import by_permuted_class, laid_out
from llmopt.partition.machine import Machine, Metric
from llmopt.partition.problem import Kind, Objective, Piece

_MOST_POOLED = 3_000_000  # states × groupings
_MOST_SUMMED = 40_000_000  # the same × items, for a least sum
_MOST_JOINED = 100_000  # the same, where many least sums are asked for
_NEAR = 1e-6  # relative: what is cut again for the order that is found need not be exact


class Likely(NamedTuple):
    """Orders that are likely to be good, the likelier first, and the seconds that nothing in any order is below."""

    orders: Iterator[list[Device]]
    bound: float


def likely_orders(machine: Machine, devices: Sequence[Device], metric: Metric, at_most: float = math.inf) -> Likely:
    """Orders to cut, none where nothing can be below `at_most`."""
    objective = machine.objective(metric)
    shortest, longest = _hops(machine, devices, metric)
    pooled = _pooled(machine, devices, metric, shortest)
    bound = simple_bound(pooled, objective)
    if bound >= at_most:
        return Likely(iter(()), bound)
    if pooled.states * len(pooled.kinds) > _MOST_POOLED:
        orders = (_by_degrees(machine, devices, metric, longest, at_most) for _ in range(1))
        return Likely(chain(chain.from_iterable(orders), by_permuted_class(devices)), bound)
    found, lowest = _stages(pooled, objective, at_most)
    bound = max(bound, lowest)
    if bound >= at_most:
        return Likely(iter(()), bound)

    def orders_by_hop() -> Iterator[list[Device]]:
        for pieces in found:
            yield laid_out(_named(pooled, devices, pieces), devices)
        if longest > shortest:
            far = _pooled(machine, devices, metric, longest)
            for pieces in _stages(far, objective, math.inf)[0]:
                yield laid_out(_named(far, devices, pieces), devices)

    return Likely(chain(orders_by_hop(), by_permuted_class(devices)), bound)


def least_possible(machine: Machine, devices: Sequence[Device], metric: Metric) -> float:
    """Seconds that nothing is below, at once; infinite where there is no group of devices."""
    if not any(degree <= many for degree in machine.degrees for many in _in_nodes(devices).values()):
        return math.inf
    pooled = _pooled(machine, devices, metric, 0.0)
    objective, alone = machine.objective(metric), [kind.alone() for kind in pooled.kinds]
    return min([simple_bound(pooled, objective), *(objective.value(one, one) for one in alone)])


def _named(problem: AnyOrder, devices: Sequence[Device], pieces: Sequence[Piece]) -> list[tuple[str, int]]:
    """The class of each stage, and how many devices it has."""
    classes = _classes(devices)
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


def simple_bound(problem: AnyOrder, objective: Objective) -> float:
    """What no stages are below: for the sum, every item where it is quickest; for the largest, the longest item, and
    all items if devices could share them.

    If items are shared so that everybody takes T, any prices y of the classes' seconds with Σ devices · y = 1 give
    T ≥ Σ over items of the least y · device-seconds (linear programming's duality).
    """
    times = np.array([np.diff(kind.time) for kind in problem.kinds])  # [kinds, items]
    total = float(times.min(axis=0).sum())
    units = np.array([one.units for one in problem.groupings])[:, None]
    every = np.array([one.place for one in problem.groupings])
    counts = np.array(problem.counts)
    used = [place for place in range(len(counts)) if counts[place] and (every == place).any()]
    each = np.array([(times * units)[every == place].min(axis=0) for place in used])  # device-seconds [classes, items]
    prices = 1 / np.maximum(each.sum(axis=1), 1e-300)
    shared = float((each * prices[:, None]).min(axis=0).sum() / (counts[used] * prices).sum())
    return objective.value(total, max(float(times.min(axis=0).max()), shared))


def _classes(devices: Sequence[Device]) -> list[str]:
    return list(dict.fromkeys(device.kind for device in devices))


def _in_nodes(devices: Sequence[Device]) -> Counter[tuple[str, int]]:
    """Devices of each class in each node."""
    return Counter((device.kind, device.node) for device in devices)


def _hops(machine: Machine, devices: Sequence[Device], metric: Metric) -> tuple[float, float]:
    """The shortest and the longest that there is."""
    nodes = {device.node: device for device in devices}
    hops = [machine.hops_s(metric, node) for node in nodes]
    single = all(many == 1 for many in Counter(device.node for device in devices).values())
    shortest = min(hop[1] if single else hop[0] for hop in hops)
    return shortest, max(hop[1] if len(nodes) > 1 else hop[0] for hop in hops)


def _pooled(machine: Machine, devices: Sequence[Device], metric: Metric, hop_s: float) -> AnyOrder:
    """All devices of a class together, as if in one node, with every degree that a node has room for."""
    classes, counts = _classes(devices), Counter(device.kind for device in devices)
    in_node = _in_nodes(devices)
    examples = {(device.kind, device.node): device for device in devices}
    kinds, groupings = [], []
    for place, kind in enumerate(classes):
        for degree in machine.degrees:
            there = [examples[key] for key, many in in_node.items() if key[0] == kind and many >= degree]
            groups = {machine.group(device, degree): None for device in there}
            if groups:
                kinds.append(_quickest([machine.kind(group, metric) for group in groups]))
                groupings.append(Grouping(place, degree, degree))
    return AnyOrder(kinds=kinds, groupings=groupings, counts=[counts[kind] for kind in classes], hop_s=hop_s)


def _quickest(kinds: Sequence[Kind]) -> Kind:
    """Groups that differ in their links as one that has the best of each."""
    if len(kinds) == 1:
        return kinds[0]
    times = np.array([np.diff(kind.time) for kind in kinds]).min(axis=0)
    return Kind(
        time=np.concatenate([[0.0], np.cumsum(times)]),
        memory=kinds[0].memory,
        capacity=max(kind.capacity for kind in kinds),
        alone_s=max(kind.alone_s for kind in kinds),
        alone_bytes=kinds[0].alone_bytes,
    )


def _by_degrees(
    machine: Machine, devices: Sequence[Device], metric: Metric, hop_s: float, at_most: float
) -> list[list[Device]]:
    """Each class with one degree at a time: fewer states, and no bound. The best of them is laid out."""
    objective = machine.objective(metric)
    chosen: tuple[float, list[tuple[str, int]]] | None = None
    problems = [_degreed(machine, devices, metric, degrees, hop_s) for degrees in _degrees(machine, devices)]
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


def _degrees(machine: Machine, devices: Sequence[Device]) -> Iterator[dict[str, int]]:
    most = _in_nodes(devices)
    choices = [
        [degree for degree in machine.degrees if any(most[key] >= degree for key in most if key[0] == kind)]
        or machine.degrees[:1]  # it has no group, and is left out
        for kind in _classes(devices)
    ]
    for chosen in product(*choices):
        yield dict(zip(_classes(devices), chosen, strict=True))


def _degreed(
    machine: Machine, devices: Sequence[Device], metric: Metric, degrees: dict[str, int], hop_s: float
) -> AnyOrder:
    """One grouping for each class, whose groups in nodes are counted."""
    counts = Counter[str]()
    for (kind, _), many in _in_nodes(devices).items():
        counts[kind] += many // degrees[kind]
    examples = {device.kind: device for device in reversed(devices)}
    return AnyOrder(
        kinds=[machine.kind(machine.group(examples[kind], degree), metric) for kind, degree in degrees.items()],
        groupings=[Grouping(place, 1, degree) for place, degree in enumerate(degrees.values())],
        counts=[counts[kind] for kind in degrees],
        hop_s=hop_s,
    )
