"""Devices in an order, from the classes of the stages that they are to have."""

from collections.abc import Sequence
from itertools import permutations

from llmopt.partition.cluster import Device

_MOST_CLASSES = 4

Free = dict[int, dict[str, list[Device]]]  # by node and class


def laid_out(stages: Sequence[tuple[str, int]], devices: Sequence[Device]) -> list[Device]:
    """Devices for stages of a class and so many devices, a node's together as far as that goes; then all others."""
    free: Free = {}
    for device in devices:
        free.setdefault(device.node, {}).setdefault(device.kind, []).append(device)
    order: list[Device] = []
    node: int | None = None
    for kind, degree in stages:
        if node is None or len(free[node].get(kind, [])) < degree:
            # The fullest node: what is left in one that is nearly used up is for stages with fewer devices.
            node = max(free, key=lambda one: (len(free[one].get(kind, [])), -one))
        group = free[node].get(kind, [])
        order += group[:degree]
        del group[:degree]
    used = {device.name for device in order}
    return [*order, *(device for device in devices if device.name not in used)]


def by_permuted_class(devices: Sequence[Device]) -> list[list[Device]]:
    """Class after class, in every order of the classes."""
    classes = list(dict.fromkeys(device.kind for device in devices))
    if len(classes) > _MOST_CLASSES:
        return [list(devices)]
    return [[device for kind in order for device in devices if device.kind == kind] for order in permutations(classes)]
