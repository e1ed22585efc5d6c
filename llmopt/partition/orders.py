"""The best stages where the order of the devices is open.

All orders are gone through where there are few. Where there are many, devices count by class (`classes`), a class
having one tensor-parallel degree at a time; what comes out is laid onto nodes, and cut again for that order with every
degree allowed and the links that are really there. The bound says how far from the best that can be.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product

from llmopt.partition.classes import MOST_STATES, AnyOrder
from llmopt.partition.cluster import Device
from llmopt.partition.fixed import FixedOrder
from llmopt.partition.joining import best, smallest_largest
from llmopt.partition.machine import Machine, Metric
from llmopt.partition.problem import Objective, Piece

MOST_ORDERS = 120
_MOST_JOINED = 20_000  # counts × items
_NEAR = 1e-6  # relative: what is cut again for the order that is found need not be exact


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
    orders = few_orders(devices)
    if orders is None:
        return _by_class(machine, devices, metric, at_most)
    found: Solution | None = None
    for order in orders:
        solution = solve_order(machine, order, metric, found.value if found else at_most)
        if solution is not None and (found is None or solution.value < found.value):
            found = solution
    return found


def few_orders(devices: Sequence[Device]) -> list[list[Device]] | None:
    """Every order that differs from the others by more than names, nodes staying together; None if they are many."""
    nodes = [list(same) for _, same in groupby(devices, key=lambda device: device.node)]
    contents = [tuple(sorted(Counter(device.kind for device in node).items())) for node in nodes]
    count = _arrangements(list(Counter(contents).values()))
    for content in contents:
        count *= _arrangements([many for _, many in content])
        if count > MOST_ORDERS:
            return None
    return [
        [device for inner in inners for device in inner]
        for order in _distinct(contents)
        for inners in product(*(list(_inner(node)) for node in _named(order, nodes, contents)))
    ]


def _arrangements(counts: Sequence[int]) -> int:
    return math.factorial(sum(counts)) // math.prod(math.factorial(count) for count in counts)


def _distinct(labels: Sequence[object]) -> Iterator[tuple[object, ...]]:
    if not labels:
        yield ()
    for label in dict.fromkeys(labels):
        rest = list(labels)
        rest.remove(label)
        for others in _distinct(rest):
            yield (label, *others)


def _named(
    order: Sequence[object], nodes: Sequence[list[Device]], contents: Sequence[object]
) -> Iterator[list[Device]]:
    left: dict[object, list[list[Device]]] = defaultdict(list)
    for node, content in zip(nodes, contents, strict=True):
        left[content].append(node)
    for content in order:
        yield left[content].pop(0)


def _inner(node: Sequence[Device]) -> Iterator[list[Device]]:
    for order in _distinct([device.kind for device in node]):
        left = {kind: [device for device in node if device.kind == kind] for kind in order}
        yield [left[kind].pop(0) for kind in order]


def _by_class(machine: Machine, devices: Sequence[Device], metric: Metric, at_most: float) -> Solution | None:
    """The best class by class, then laid onto nodes; only the best choice of degrees is."""
    objective = machine.objective(metric)
    chosen: tuple[float, list[Piece]] | None = None
    bound = math.inf
    problems = [_classes(machine, devices, metric, degrees) for degrees in _degrees_by_class(machine, devices)]
    # The small ones are quick, and what they find rules most of the others out.
    for any_order, hops in sorted(problems, key=lambda one: one[0].states):
        lowest = _bound(any_order, objective)
        if lowest >= at_most:
            continue
        pieces = _stages(any_order, objective, at_most)
        if pieces is None:
            continue
        seconds = any_order.seconds(pieces)
        value = objective.value(sum(seconds), max(seconds))
        bound = min(bound, value if hops[0] == hops[1] and _exact(any_order, objective) else lowest)
        if chosen is None or value < chosen[0]:
            chosen, at_most = (value, pieces), min(at_most, value)
    if chosen is None:
        return None
    solution = solve_order(machine, _laid_out(chosen[1], devices), metric)
    return None if solution is None else replace(solution, bound=min(bound, solution.value))


def _degrees_by_class(machine: Machine, devices: Sequence[Device]) -> Iterator[dict[str, int]]:
    kinds = list(dict.fromkeys(device.kind for device in devices))
    most = Counter((device.kind, device.node) for device in devices)
    choices = [
        [degree for degree in machine.degrees if any(most[key] >= degree for key in most if key[0] == kind)]
        or machine.degrees[:1]  # it has no group, and is left out
        for kind in kinds
    ]
    for chosen in product(*choices):
        yield dict(zip(kinds, chosen, strict=True))


def _classes(
    machine: Machine, devices: Sequence[Device], metric: Metric, degrees: dict[str, int]
) -> tuple[AnyOrder, tuple[float, float]]:
    """The groups by class, and the shortest and the longest hop."""
    counts = Counter[str]()
    examples: dict[str, Device] = {}
    for (kind, _), many in Counter((device.kind, device.node) for device in devices).items():
        counts[kind] += many // degrees[kind]
    for device in devices:
        examples.setdefault(device.kind, device)
    kinds = [machine.kind(machine.group(examples[kind], degree), metric) for kind, degree in degrees.items()]
    hops = [machine.hops_s(metric, device.node) for device in {one.node: one for one in devices}.values()]
    several = len(hops) > 1
    single = all(many == 1 for many in Counter(device.node for device in devices).values())
    shortest = min(hop[1] if single else hop[0] for hop in hops)
    longest = max(hop[1] if several else hop[0] for hop in hops)
    return AnyOrder(
        kinds=kinds, counts=[counts[kind] for kind in degrees], degrees=list(degrees.values()), hop_s=longest
    ), (shortest, longest)


def _exact(any_order: AnyOrder, objective: Objective) -> bool:
    return objective.only_largest(any_order.most_stages) or _can_join(any_order, objective)


def _can_join(any_order: AnyOrder, objective: Objective) -> bool:
    size = any_order.states * any_order.kinds[0].items
    return size <= _MOST_JOINED or (objective.micro_batches == 1 and any_order.can_sum)


def _stages(any_order: AnyOrder, objective: Objective, at_most: float) -> list[Piece] | None:
    if any_order.states > MOST_STATES:
        return None
    if _exact(any_order, objective):
        return best(any_order, objective, at_most)
    found = smallest_largest(any_order, at_most / objective.micro_batches, _NEAR)
    return found[0] if found is not None else None


def _bound(any_order: AnyOrder, objective: Objective) -> float:
    """What no stages are below: every item where it is quickest; the average and the longest item as the largest."""
    quickest = [min(kind.times[item + 1] - kind.times[item] for kind in any_order.kinds) for item in _items(any_order)]
    saved = max(kind.alone_s for kind in any_order.kinds)
    total = sum(quickest) - saved
    largest = max(max(quickest[:-1], default=0.0), total / max(any_order.most_stages, 1))
    return objective.value(total, largest)


def _items(any_order: AnyOrder) -> range:
    return range(any_order.kinds[0].items)


def _laid_out(pieces: Sequence[Piece], devices: Sequence[Device]) -> list[Device]:
    """Devices in the order of the classes that were found, a node's together as far as that goes."""
    kinds = list(dict.fromkeys(device.kind for device in devices))
    free: dict[int, dict[str, list[Device]]] = {}
    for device in devices:
        free.setdefault(device.node, {}).setdefault(device.kind, []).append(device)
    order: list[Device] = []
    node: int | None = None
    for piece in pieces:
        kind = kinds[piece.kind]
        if node is None or len(free[node].get(kind, [])) < piece.degree:
            node = max(free, key=lambda one: (len(free[one].get(kind, [])) >= piece.degree, -one))
        group = free[node][kind]
        order += group[: piece.degree]
        del group[: piece.degree]
    return order
