"""Devices by class: all of a class together, as if in one node, or as groups of one degree each."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Literal

import numpy as np

from llmopt.partition.cluster import Device
from llmopt.partition.machine import Machine, Metric
from llmopt.partition.problem import Kind, Objective
from llmopt.partition.solver.classes import AnyOrder, Grouping

Hop = Literal["shortest", "longest"]


def classes_of(devices: Sequence[Device]) -> list[str]:
    """The classes that there are."""
    return list(dict.fromkeys(device.kind for device in devices))


def in_nodes(devices: Sequence[Device]) -> Counter[tuple[str, int]]:
    """Devices of each class in each node."""
    return Counter((device.kind, device.node) for device in devices)


def longest_hop_s(machine: Machine, devices: Sequence[Device], metric: Metric) -> float:
    """To any of the devices, from another node if there is one."""
    several = len({device.node for device in devices}) > 1
    examples = {(device.kind, device.node): device for device in devices}.values()
    return max(machine.hops_s(metric, device)[several] for device in examples)


def pooled_devices(machine: Machine, devices: Sequence[Device], metric: Metric, hop: Hop = "shortest") -> AnyOrder:
    """All devices of a class together, as if in one node, with every degree that a node has room for."""
    classes, counts = classes_of(devices), Counter(device.kind for device in devices)
    in_node = in_nodes(devices)
    examples = {(device.kind, device.node): device for device in devices}
    in_all = Counter(device.node for device in devices)
    kinds, groupings, hops_s = [], [], []
    for place, kind in enumerate(classes):
        for degree in machine.degrees:
            there = [examples[key] for key, many in in_node.items() if key[0] == kind and many >= degree]
            groups = {machine.group(device, degree): None for device in there}
            if groups:
                kinds.append(_quickest([machine.kind(group, metric) for group in groups]))
                groupings.append(Grouping(place, degree, degree))
                # A group that has its node to itself is always behind a hop from another one.
                hops = [machine.hops_s(metric, device)[0 if in_all[device.node] > degree else 1] for device in there]
                hops_s.append(min(hops) if hop == "shortest" else longest_hop_s(machine, devices, metric))
    return AnyOrder(kinds=kinds, groupings=groupings, counts=[counts[kind] for kind in classes], hops_s=hops_s)


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


def degrees_by_class(machine: Machine, devices: Sequence[Device]) -> Iterator[dict[str, int]]:
    """Every choice of one degree for each class."""
    most = in_nodes(devices)
    choices = [
        [degree for degree in machine.degrees if any(most[key] >= degree for key in most if key[0] == kind)]
        or machine.degrees[:1]  # it has no group, and is left out
        for kind in classes_of(devices)
    ]
    for chosen in product(*choices):
        yield dict(zip(classes_of(devices), chosen, strict=True))


def degreed_devices(machine: Machine, devices: Sequence[Device], metric: Metric, degrees: dict[str, int]) -> AnyOrder:
    """One grouping for each class, whose groups in nodes are counted."""
    counts = Counter[str]()
    for (kind, _), many in in_nodes(devices).items():
        counts[kind] += many // degrees[kind]
    examples = {device.kind: device for device in reversed(devices)}
    return AnyOrder(
        kinds=[machine.kind(machine.group(examples[kind], degree), metric) for kind, degree in degrees.items()],
        groupings=[Grouping(place, 1, degree) for place, degree in enumerate(degrees.values())],
        counts=[counts[kind] for kind in degrees],
        hops_s=[longest_hop_s(machine, devices, metric)] * len(degrees),
    )


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
