"""The ways to put stages on devices, in an order or in any: a graph of steps, and what each is on the devices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmopt.partition.cluster import Device
from llmopt.partition.machine import Machine, Metric
from llmopt.partition.nodes import nodes_of
from llmopt.partition.problem import Array, Kind, Piece
from llmopt.partition.solver.steps import Steps, steps_in_order
from llmopt.partition.solver.stepwise import Stepwise

MOST_CELLS = 1_500_000  # steps × items: more take too long to go through

Placed = tuple[tuple[Device, ...], tuple[Piece, ...]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ways:
    """A graph; kind, degree and first device (or one like it) of each step; and how its stages are placed."""

    machine: Machine
    steps: Steps
    kind_of: Sequence[int]
    degrees: Sequence[int]
    devices: Sequence[Device]
    kinds: Callable[[Metric], Sequence[Kind]]
    placed: Callable[[Sequence[Piece]], Placed]

    def hops_s(self, metric: Metric) -> Array:
        """To the devices of each step."""
        hops = [self.machine.hops_s(metric, device) for device in self.devices]
        return np.array([hop[0 if step.near else 1] for hop, step in zip(hops, self.steps.every, strict=True)])

    def stepwise(self, metric: Metric) -> Stepwise:
        """The problem for one metric."""
        return Stepwise(
            steps=self.steps,
            kinds=self.kinds(metric),
            kind_of=self.kind_of,
            degrees=self.degrees,
            hops_s=self.hops_s(metric).tolist(),
            most_stages=min(self.machine.costs.items, max(self.steps.levels)),
        )


def ways_in_order(machine: Machine, devices: Sequence[Device]) -> Ways | None:
    """For one order; None where there are too many, or none."""
    _, slots = machine.slots(devices, "tpot")
    most_steps = MOST_CELLS // machine.costs.items
    steps = steps_in_order(slots, [device.node for device in devices], most_steps=most_steps)
    if steps is None or not steps.every:
        return None
    places = [step.taken if isinstance(step.taken, int) else 0 for step in steps.every]
    return Ways(
        machine=machine,
        steps=steps,
        kind_of=[step.option for step in steps.every],
        degrees=[step.after - place for step, place in zip(steps.every, places, strict=True)],
        devices=[devices[place] for place in places],
        kinds=lambda metric: machine.slots(devices, metric)[0],
        placed=lambda pieces: (tuple(devices), tuple(piece._replace(slot=places[piece.slot]) for piece in pieces)),
    )


def ways_in_any_order(machine: Machine, devices: Sequence[Device]) -> Ways | None:
    """For all orders; None where there are too many, or none."""
    nodes = nodes_of(machine, devices)
    steps = nodes.steps(MOST_CELLS // machine.costs.items)
    if steps is None or not steps.every:
        return None
    options = [nodes.options[step.option] for step in steps.every]
    return Ways(
        machine=machine,
        steps=steps,
        kind_of=[step.option for step in steps.every],
        degrees=[option.degree for option in options],
        devices=[nodes.device(option) for option in options],
        kinds=nodes.kinds,
        placed=lambda pieces: nodes.placed(steps, pieces),
    )
