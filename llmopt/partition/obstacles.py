"""Why there is no plan: which memory, which head count or which promise is in the way, and what would help."""

from collections.abc import Sequence

from llmopt.errors import BudgetError
from llmopt.partition.candidate import Candidate
from llmopt.partition.cluster import Device
from llmopt.partition.machine import Machine
from llmopt.partition.plan import Stage
from llmopt.partition.promises import Promise
from llmopt.partition.remedies import remedies
from llmopt.partition.settings import Settings
from llmopt.partition.wanted import Model
from llmopt.words import counted


def explain(settings: Settings, devices: Sequence[Device], degrees: Sequence[int]) -> BudgetError:
    """The error for a model that does not fit."""
    machine = settings.machine(1, settings.sequences(1), degrees)
    hints = remedies(settings, devices)
    hint = ", or ".join(hints) if hints else "no one change is enough: give devices with more memory, and fewer tokens"
    return BudgetError(_what_is_in_the_way(settings.model, machine, devices), hint=hint)


def _what_is_in_the_way(model: Model, machine: Machine, devices: Sequence[Device]) -> str:
    costs = machine.item_costs(machine.group(devices[0], 1))
    weights, cache = float(costs.weight_bytes.sum()) - costs.tied_bytes, float(costs.kv_bytes.sum())
    parts = f"{_size(weights)} of weights and {_size(cache)} of cache"
    rooms = [_room(machine, device) for device in devices]
    if max(rooms) <= 0:
        most = max(machine.cluster.device_class(device.kind).usable_bytes for device in devices)
        needed = f"the activations of one micro-batch need {_size(costs.activation_bytes)} on a device"
        return f"{needed}, and no device has more than {_size(most)}"
    room = sum(max(one, 0.0) for one in rooms)
    if weights + cache > room:
        return f"{parts} do not fit into {_size(room)} on {counted(len(devices), 'device')}"
    items = (costs.weight_bytes + costs.kv_bytes).tolist()
    largest = max(range(len(items)), key=items.__getitem__)
    if items[largest] > max(rooms):
        needed = f"{_part(largest, machine)} needs {_size(items[largest])}"
        return f"{needed}, and no device has more than {_size(max(rooms))}{_undivided(model, devices)}"
    return f"{parts} fit into {_size(room)}, but not in whole blocks"


def _part(item: int, machine: Machine) -> str:
    if item == machine.costs.items - 1:
        return "the head"
    return "the first block with the embedding" if item == 0 else f"block {item}"


def _undivided(model: Model, devices: Sequence[Device]) -> str:
    """Why no node divides it further: the first degree that is not legal."""
    there = [sum(one.kind == each.kind and one.node == each.node for one in devices) for each in devices]
    every = [model.shared_by(degree) for degree in range(2, max(there) + 1)]
    obstacles = [one.obstacle for one in every if one.obstacle is not None]
    return f"; {obstacles[0]}" if obstacles else ""


def _room(machine: Machine, device: Device) -> float:
    group = machine.group(device, 1)
    return group.device.usable_bytes - machine.item_costs(group).activation_bytes


def too_large(machine: Machine, devices: Sequence[Device], stages: Sequence[Stage]) -> BudgetError:
    """The error for stages that somebody gave, of which one does not fit."""
    for number, stage in enumerate(stages):
        kind = next(device.kind for device in devices if device.name == stage.devices[0])
        room = machine.cluster.device_class(kind).usable_bytes
        if stage.memory_bytes > room:
            what = f"stage {number} needs {_size(stage.memory_bytes)} on {stage.devices[0]}, which has {_size(room)}"
            return BudgetError(what, where="--split", hint=_fewer_blocks(stage, room))
    raise AssertionError("every stage fits")


def _fewer_blocks(stage: Stage, room: float) -> str:
    blocks = stage.layers[1] - stage.layers[0]
    if not blocks:
        return "leave that device out"
    over = stage.memory_bytes - room
    each = (stage.weight_bytes + stage.kv_bytes) / blocks
    return f"give it {counted(max(blocks - int(-(-over // each)), 0), 'block')} at most"


def _size(size_bytes: float) -> str:
    """In the largest unit that leaves a number above 1."""
    for unit, many in (("GB", 1e9), ("MB", 1e6)):
        if abs(size_bytes) >= many:
            return f"{size_bytes / many:.4g} {unit}"
    return f"{size_bytes / 1e3:.4g} kB"


def broken(promises: Sequence[Promise], nearest: Candidate | None) -> BudgetError:
    """The error for promises that no plan keeps; `nearest` keeps all but the last, and comes nearest to that."""
    *others, last = promises
    besides = f" beside {' and '.join(map(str, others))}" if others else ""
    hint = "add devices, or lower --prompt or --batch"
    if nearest is not None:
        hint = f"what comes nearest has {last.name} {getattr(nearest.predicted, last.name):.4g}; {hint}"
    return BudgetError(f"no plan keeps {last}{besides}", where="--slo", hint=hint)
