"""The cheapest devices, or the fewest, that a model fits on and keeps its promises with."""

import math
from collections.abc import Iterator, Sequence
from itertools import product

from llmopt.errors import UsageError
from llmopt.partition.candidate import candidate_from
from llmopt.partition.cluster import Device
from llmopt.partition.conditions import Tolls, solve_under
from llmopt.partition.machine import Machine
from llmopt.partition.promises import Promise, bounds_of
from llmopt.partition.settings import Setting
from llmopt.partition.target import NOTHING, Answer, answer_for_metric
from llmopt.words import counted

_MOST_PURCHASES = 100_000


def answer_for_cost(
    setting: Setting, tolls: Tolls, promises: tuple[Promise, ...], *, in_order: bool, below: float = math.inf
) -> Answer:
    """The plan whose devices cost least, below a value.

    Raises:
        UsageError: there are too many ways to choose among the devices.
    """
    machine, copies = setting.machine, setting.machine.replicas
    at_most = below / copies
    bounds = bounds_of(promises, machine)
    found = solve_under(machine, setting.devices, tolls, bounds, in_order=in_order, at_most=at_most)
    if found.solution is not None:
        return Answer(candidate=candidate_from(machine, found.solution), bound=found.bound * copies)
    if math.isinf(found.bound):
        return NOTHING
    return _first_that_does(setting, tolls, promises, in_order=in_order, at_most=at_most)


def _first_that_does(
    setting: Setting, tolls: Tolls, promises: tuple[Promise, ...], *, in_order: bool, at_most: float
) -> Answer:
    """Purchases from the cheapest on, the first devices of each class. None is cheaper than the first with the memory
    that is needed; which of a class's devices are chosen is not gone through."""
    metric = promises[0].metric if promises else "tpot"
    machine, copies = setting.machine, setting.machine.replicas
    least: float | None = None
    for cost, devices in _purchases(setting, tolls):
        least = cost if least is None else least
        if cost >= at_most:
            break
        one = Setting(machine=machine, devices=tuple(devices))
        answer = answer_for_metric(one, metric, promises, in_order=in_order)
        if answer.candidate is not None:
            return Answer(candidate=answer.candidate, bound=least * copies)
    return NOTHING if least is None else Answer(candidate=None, bound=least * copies)


def _purchases(setting: Setting, tolls: Tolls) -> Iterator[tuple[float, list[Device]]]:
    """Numbers of devices of each class whose memory is enough, from the cheapest on."""
    by_kind: dict[str, list[Device]] = {}
    for device in setting.devices:
        by_kind.setdefault(device.kind, []).append(device)
    counts = [range(len(of_kind) + 1) for of_kind in by_kind.values()]
    if math.prod(map(len, counts)) > _MOST_PURCHASES:
        what = f"more than {_MOST_PURCHASES:,} ways to choose among {counted(len(setting.devices), 'device')}"
        raise UsageError(what, where="--objective", hint="give a smaller cluster, or fewer classes")
    needed = memory_needed(setting.machine, setting.devices)
    rooms = [setting.machine.cluster.device_class(kind).usable_bytes for kind in by_kind]
    prices = [tolls[kind] for kind in by_kind]
    enough = [chosen for chosen in product(*counts) if any(chosen) and _dot(chosen, rooms) >= needed]
    for chosen in sorted(enough, key=lambda chosen: (_dot(chosen, prices), sum(chosen))):
        bought = [device for many, of_kind in zip(chosen, by_kind.values(), strict=True) for device in of_kind[:many]]
        yield _dot(chosen, prices), sorted(bought, key=setting.devices.index)


def _dot(counts: Sequence[int], values: Sequence[float]) -> float:
    return sum(count * value for count, value in zip(counts, values, strict=True))


def memory_needed(machine: Machine, devices: Sequence[Device]) -> float:
    """Weights and cache, wherever they are; a tied table once."""
    costs = machine.item_costs(machine.group(devices[0], 1))
    return float(costs.weight_bytes.sum() + costs.kv_bytes.sum()) - costs.tied_bytes
