"""A plan in full: what was found, what stands beside it for comparison, and what is to be known about it."""

from collections.abc import Sequence

from llmopt.partition.candidate import Candidate, worth
from llmopt.partition.cluster import Device, to_json
from llmopt.partition.machine import Machine, share
from llmopt.partition.own_split import divided
from llmopt.partition.plan import Plan, Predicted
from llmopt.partition.problem import Piece
from llmopt.partition.settings import Settings
from llmopt.words import counted

TOLD = 1e-6  # relative: a gap below that is none that people ask about


def finished(settings: Settings, candidate: Candidate, devices: Sequence[Device], bound: float | None) -> Plan:
    """The plan. `bound` is what nothing is below, in the objective's unit."""
    machine, model, wanted = candidate.machine, settings.model, settings.wanted
    value = worth(candidate, wanted.objective, settings.cluster)
    lowest = min(bound, value) if bound is not None else None
    gap = None if lowest is None or not value else (value - lowest) / value
    mine = share(settings.cluster, devices, machine.replicas) or []
    used = {device.name for device in candidate.used()}
    notes = [*_notes(settings, machine)]
    if wanted.split is None and gap is not None and gap > TOLD:
        notes.append(_not_proven(settings, devices, gap))
    return Plan(
        model=model.name,
        revision=model.revision,
        cluster=to_json(settings.cluster),
        objective=wanted.objective,
        workload=settings.workload,
        dtype=model.precision.dtype,
        schemes={name: scheme.name for name, scheme in model.precision.schemes.items()},
        micro_batches=machine.costs.cut.count,
        replicas=machine.replicas,
        stages=candidate.stages,
        predicted=candidate.predicted,
        baselines={
            "even_split": _even(settings, candidate, mine),
            "single_device": _single(settings, machine, mine),
        },
        value=value,
        lower_bound_ms=lowest,
        gap=gap,
        unused=tuple(device.name for device in mine if device.name not in used),
        notes=tuple(notes),
    )


def _not_proven(settings: Settings, devices: Sequence[Device], gap: float) -> str:
    open_order = "" if settings.wanted.order is not None else " and their orders"
    what = f"{counted(len(devices), 'device')}{open_order}"
    return (
        f"not proven to be the best: not all ways to use {what} were gone through; at most {100 * gap:.2g} % above it"
    )


def _even(settings: Settings, candidate: Candidate, mine: Sequence[Device]) -> Predicted | None:
    """As many blocks for everyone: for the groups of the plan, or for all devices if that is one group."""
    blocks, machine = len(settings.model.spec.blocks), candidate.machine
    if len(candidate.stages) > 1:
        named = {device.name: device for device in mine}
        order = [named[name] for stage in candidate.stages for name in stage.devices]
        degrees = [stage.tp for stage in candidate.stages]
    else:
        order, degrees = list(mine[:blocks]), [1] * min(len(mine), blocks)
    if len(degrees) < 2:
        return None
    each, more = divmod(blocks, len(degrees))
    pieces = divided([each + (index < more) for index in range(len(degrees))], 1)
    starts = [sum(degrees[:index]) for index in range(len(degrees))]
    placed = [
        piece._replace(slot=start, degree=degree) for piece, start, degree in zip(pieces, starts, degrees, strict=True)
    ]
    stages = machine.stages(order, placed)
    return machine.predicted(stages) if machine.fits(stages) else None


def _single(settings: Settings, machine: Machine, mine: Sequence[Device]) -> Predicted | None:
    """The quickest of the devices by itself, its batch whole."""
    alone = settings.machine(machine.replicas, 1, [1])
    found = []
    for device in {device.kind: device for device in mine}.values():
        stages = alone.stages([device], [Piece(0, 1, 0, 0, alone.costs.items)])
        if alone.fits(stages):
            found.append(alone.predicted(stages))
    return min(found, key=lambda one: one.tpot_ms, default=None)


def _notes(settings: Settings, machine: Machine) -> list[str]:
    notes = []
    kinds = sorted({device.kind for device in settings.cluster.all_devices()})
    guessed = [kind for kind in kinds if settings.cluster.device_class(kind).source == "data sheet"]
    if guessed:
        notes.append(f"from data sheets, not measured: {', '.join(guessed)}")
    schemes = {scheme.name for scheme in machine.costs.precision.schemes.values() if scheme.activation_bits == 16}
    dtype = settings.model.precision.dtype
    notes += [f"{one}, where its speed is not known, is computed in {dtype}" for one in sorted(schemes)]
    return notes
