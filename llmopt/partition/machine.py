"""Devices as a planner sees them: in an order, in nodes, in groups; and what they take for the parts of a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import numpy as np

from llmopt.partition.cluster import Cluster, Device
from llmopt.partition.cost import Costs, Group, ItemCosts, prefix
from llmopt.partition.plan import Predicted, Stage
from llmopt.partition.problem import Array, Kind, Objective, Piece, Slot

Metric = Literal["ttft", "tpot", "throughput"]

_MS = 1e3
_ID_BYTES = 8


@dataclass(kw_only=True, eq=False)
class Machine:
    """A model at work on the devices of one replica, of which there are `replicas`."""

    cluster: Cluster
    costs: Costs
    degrees: Sequence[int]
    replicas: int = 1
    _items: dict[Group, ItemCosts] = field(default_factory=dict, init=False)
    _kinds: dict[tuple[Group, Metric], Kind] = field(default_factory=dict, init=False)
    _groups: dict[tuple[str, int, str], Group] = field(default_factory=dict, init=False)

    def group(self, device: Device, degree: int) -> Group:
        """`degree` devices like this one."""
        node = self.cluster.machine(device.node)
        key = (device.kind, degree, node.name if degree > 1 else "")
        if key not in self._groups:
            link, sums = (node.link, node.sums) if degree > 1 else (None, None)
            known = self.cluster.device_class(device.kind)
            self._groups[key] = Group(device=known, kind=device.kind, degree=degree, link=link, sums=sums)
        return self._groups[key]

    def item_costs(self, group: Group) -> ItemCosts:
        """Of every part on a group."""
        if group not in self._items:
            self._items[group] = self.costs.on(group)
        return self._items[group]

    def objective(self, metric: Metric) -> Objective:
        """How a metric comes from what stages take."""
        if metric == "ttft":
            return Objective(form="fill", micro_batches=self.costs.cut.count)
        return Objective(form="rounds", micro_batches=self.costs.cut.groups)

    def unit(self, metric: Metric) -> float:
        """What a second that the search counts is in an objective's unit: ms, or ms a token of all sequences."""
        tokens = self.replicas * self.costs.cut.sequences * self.costs.workload.output
        return _MS / tokens if metric == "throughput" else _MS

    def kind(self, group: Group, metric: Metric) -> Kind:
        """A group as the search knows it."""
        if (group, metric) not in self._kinds:
            self._kinds[group, metric] = self._kind(group, metric)
        return self._kinds[group, metric]

    def _kind(self, group: Group, metric: Metric) -> Kind:
        costs = self.item_costs(group)
        back_s = self._back_s()
        prefill_back_s, decode_back_s = back_s / self.costs.cut.parts, back_s + self._first_waking_s()
        prefill_s, decode_s = costs.prefill_s.copy(), costs.decode_s.copy()
        prefill_s[-1] += prefill_back_s
        decode_s[-1] += decode_back_s
        return Kind(
            time=prefix(self._mixed(metric, prefill_s, decode_s)),
            memory=prefix(costs.weight_bytes + costs.kv_bytes),
            capacity=group.device.usable_bytes - costs.activation_bytes,
            alone_s=float(self._mixed(metric, np.array(prefill_back_s), np.array(decode_back_s))),
            alone_bytes=costs.tied_bytes,
        )

    def _mixed(self, metric: Metric, prefill_s: Array, decode_s: Array) -> Array:
        if metric == "ttft":
            return prefill_s
        if metric == "tpot":
            return decode_s
        # All that a micro-batch asks of a stage from its first token to its last.
        return prefill_s * self.costs.cut.parts + decode_s * (self.costs.workload.output - 1)

    def hops_s(self, metric: Metric, device: Device) -> tuple[float, float]:
        """To a device from its own node, and from another, until it is awake."""
        prefill_s, decode_s = self._messages_s(device.node)
        inside, between = self._mixed(metric, prefill_s, decode_s + self._waking_s(device.kind))
        return float(inside), float(between)

    def _messages_s(self, node: int) -> tuple[Array, Array]:
        """With a micro-batch of prompts, and with a token: from a device of the node, and of another one, [2] each."""
        links = self.cluster.machine(node).link, self.cluster.between
        sizes = self.costs.prefill_hop_bytes, self.costs.decode_hop_bytes
        prefill_s, decode_s = (np.array([link.seconds(size) if link else 0.0 for link in links]) for size in sizes)
        # From another node no phase is quicker than within one.
        return np.maximum.accumulate(prefill_s), np.maximum.accumulate(decode_s)

    def _waking_s(self, kind: str) -> float:
        return self.costs.waking_s(self.cluster.device_class(kind))

    def _back_s(self) -> float:
        """The chosen tokens go back to the first stage, over the slowest link that there is."""
        links = [self.cluster.between, *(node.link for node in self.cluster.nodes)]
        size = _ID_BYTES * self.costs.cut.batch
        return max((link.seconds(size) for link in links if link is not None), default=0.0)

    def _first_waking_s(self) -> float:
        """The first stage wakes as the slowest device does."""
        return max(self._waking_s(kind) for kind in {kind for node in self.cluster.nodes for kind in node.devices})

    def slots(self, devices: Sequence[Device], metric: Metric) -> tuple[list[Kind], list[Slot]]:
        """An order of devices as the search knows it."""
        kinds: list[Kind] = []
        numbers: dict[Group, int] = {}
        slots: list[Slot] = []
        followers = _followers(devices)
        for place, device in enumerate(devices):
            run = slots[-1].run + (device.node != devices[place - 1].node) if slots else 0
            options = []
            for degree in self.degrees:
                if degree <= followers[place]:
                    group = self.group(device, degree)
                    if group not in numbers:
                        numbers[group] = len(kinds)
                        kinds.append(self.kind(group, metric))
                    options.append((degree, numbers[group]))
            inside_s, between_s = self.hops_s(metric, device)
            slots.append(Slot(options=tuple(options), run=run, inside_s=inside_s, between_s=between_s))
        return kinds, slots

    def stages(self, devices: Sequence[Device], pieces: Sequence[Piece]) -> tuple[Stage, ...]:
        """What was found, as a plan says it."""
        return tuple(self._stages(devices, pieces))

    def _stages(self, devices: Sequence[Device], pieces: Sequence[Piece]) -> Iterator[Stage]:
        node, items = None, self.costs.items
        for number, piece in enumerate(pieces):
            device = devices[piece.slot]
            group = self.group(device, piece.degree)
            costs = self.item_costs(group)
            part = slice(piece.first, piece.stop)
            inside = device.node == node
            hops = [float(one[0 if inside else 1]) for one in self._messages_s(device.node)]
            back_s = self._back_s() if piece.stop == items and len(pieces) > 1 else 0.0
            prefill_hop_s, decode_hop_s = hops if number else (0.0, 0.0)
            prefill_hop_s, decode_hop_s = prefill_hop_s + back_s / self.costs.cut.parts, decode_hop_s + back_s
            waking_s = self._waking_s(device.kind) if number else self._first_waking_s()
            tied, waking_s = (costs.tied_bytes, 0.0) if len(pieces) == 1 else (0.0, waking_s)
            yield Stage(
                devices=tuple(one.name for one in devices[piece.slot : piece.slot + piece.degree]),
                tp=piece.degree,
                layers=(piece.first, min(piece.stop, items - 1)),
                embedding=piece.first == 0,
                lm_head=piece.stop == items,
                weight_bytes=round(float(costs.weight_bytes[part].sum()) - tied),
                kv_bytes=round(float(costs.kv_bytes[part].sum())),
                activation_bytes=round(costs.activation_bytes),
                prefill_ms=_MS * (float(costs.prefill_s[part].sum()) + prefill_hop_s),
                decode_ms=_MS * (float(costs.decode_s[part].sum()) + waking_s + decode_hop_s),
                prefill_hop_ms=_MS * prefill_hop_s,
                decode_hop_ms=_MS * decode_hop_s,
            )
            node = device.node

    def predicted(self, stages: Sequence[Stage]) -> Predicted:
        """Times of a plan as a whole, from those of its stages."""
        cut, work = self.costs.cut, self.costs.workload
        prefill, decode = ([getattr(stage, name) for stage in stages] for name in ("prefill_ms", "decode_ms"))
        whole = [cut.parts * one + (work.output - 1) * other for one, other in zip(prefill, decode, strict=True)]
        cycle_ms = self.objective("throughput").value(sum(whole), max(whole))
        tokens = self.replicas * cut.sequences * work.output
        return Predicted(
            ttft_ms=self.objective("ttft").value(sum(prefill), max(prefill)),
            tpot_ms=self.objective("tpot").value(sum(decode), max(decode)),
            throughput_tokens_per_s=_MS * tokens / cycle_ms,
        )

    def fits(self, stages: Sequence[Stage]) -> bool:
        """Whether every stage has the memory that it needs."""
        kinds = {device.name: device.kind for device in self.cluster.all_devices()}
        return all(
            stage.memory_bytes <= self.cluster.device_class(kinds[stage.devices[0]]).usable_bytes + 1
            for stage in stages
        )


def _followers(devices: Sequence[Device]) -> list[int]:
    """How many devices of one class and node begin at each place."""
    found: list[int] = []
    for _, same in groupby(devices, key=lambda device: (device.kind, device.node)):
        count = len(list(same))
        found.extend(range(count, 0, -1))
    return found


def share(cluster: Cluster, devices: Sequence[Device], replicas: int) -> list[Device] | None:
    """The devices of one of several replicas that are all alike, or None where they cannot be."""
    if replicas == 1:
        return list(devices)
    found: list[Device] = []
    machines = [list(same) for _, same in groupby(devices, key=lambda device: device.node)]
    for _, alike in groupby(machines, key=lambda machine: cluster.machine(machine[0].node).name):
        group = list(alike)
        if len(group) % replicas == 0:
            found += [device for machine in group[: len(group) // replicas] for device in machine]
            continue
        for machine in group:
            for _, same in groupby(machine, key=lambda device: device.kind):
                of_kind = list(same)
                if len(of_kind) % replicas:
                    return None
                found += of_kind[: len(of_kind) // replicas]
    return found
