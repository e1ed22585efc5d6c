"""Why there is no plan, and the nearest change that would allow one."""

from collections.abc import Sequence

from llmopt.errors import BudgetError
from llmopt.partition.cluster import Device
from llmopt.partition.machine import Machine
from llmopt.partition.plan import Stage
from llmopt.words import counted

_GB = 1e9


def explain(machine: Machine, devices: Sequence[Device], stages: Sequence[Stage] = ()) -> BudgetError:
    """The error for a model that does not fit: which memory is in the way, and what would have to change."""
    for number, stage in enumerate(stages):
        kind = next(device.kind for device in devices if device.name == stage.devices[0])
        room = machine.cluster.device_class(kind).usable_bytes
        if stage.memory_bytes > room:
            needed = f"{stage.memory_bytes / _GB:.4g} GB on {stage.devices[0]}"
            what = f"stage {number} needs {needed}, which has {room / _GB:.4g}"
            return BudgetError(what, hint=_fewer_blocks(stage, room))
    costs = machine.item_costs(machine.group(devices[0], 1))
    weights, cache = float(costs.weight_bytes.sum()) - costs.tied_bytes, float(costs.kv_bytes.sum())
    room = sum(_room(machine, device) for device in devices)
    parts = f"{weights / _GB:.4g} GB of weights and {cache / _GB:.4g} GB of cache"
    if weights + cache > room:
        what = f"{parts} do not fit into {room / _GB:.4g} GB on {counted(len(devices), 'device')}"
        return BudgetError(what, hint=_nearest(machine, devices, weights + cache - room, cache, room - weights))
    largest = float((costs.weight_bytes + costs.kv_bytes).max())
    widest = max(_room(machine, device) for device in devices)
    if largest > widest:
        what = f"the largest part needs {largest / _GB:.4g} GB, and no device has more than {widest / _GB:.4g}"
        return BudgetError(what, hint="give devices with more memory, tensor parallelism, or --scheme w4a16")
    what = f"{parts} fit into {room / _GB:.4g} GB, but not in whole blocks"
    return BudgetError(what, hint=_nearest(machine, devices, largest, cache, room - weights))


def _room(machine: Machine, device: Device) -> float:
    group = machine.group(device, 1)
    return group.device.usable_bytes - machine.item_costs(group).activation_bytes


def _fewer_blocks(stage: Stage, room: float) -> str:
    blocks = stage.layers[1] - stage.layers[0]
    if not blocks:
        return "leave that device out"
    over = stage.memory_bytes - room
    each = (stage.weight_bytes + stage.kv_bytes) / blocks
    return f"give it {counted(max(blocks - int(-(-over // each)), 0), 'block')} at most"


def _nearest(machine: Machine, devices: Sequence[Device], missing: float, cache: float, left: float) -> str:
    """More of the last class, or a cache as small as there is room for, or weights with fewer bits."""
    more = int(-(-missing // max(_room(machine, devices[-1]), 1.0)))
    hints = [f"add {counted(more, 'device')} like {devices[-1].kind}"]
    work = machine.costs.workload
    if cache and 0 < left < cache:
        batch, context = int(work.batch * left / cache), int(work.context * left / cache)
        hints.append(f"--batch {batch}" if batch else f"a context of {context} tokens")
    if not machine.costs.precision.schemes:
        hints.append("--scheme w8a16 or w4a16")
    return ", or ".join(hints)
