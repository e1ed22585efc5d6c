"""The nodes of a cluster as a search over all orders sees them: those that are alike, and the groups in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from llmopt.partition.cluster import Device
from llmopt.partition.machine import Machine, Metric
from llmopt.partition.problem import Kind, Piece
from llmopt.partition.solver.steps import Counts, Option, Site, Steps, steps_in_any_order


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Nodes:
    """The devices there are, [site][node][class]; nodes of one site are alike."""

    machine: Machine
    devices: tuple[tuple[tuple[tuple[Device, ...], ...], ...], ...]
    sites: tuple[Site, ...]
    options: tuple[Option, ...]

    def steps(self, most_steps: int) -> Steps | None:
        """The graph of all orders; None where it is larger than that."""
        most_stages = min(self.machine.costs.items, sum(site.nodes * sum(site.counts) for site in self.sites))
        return _steps(self.sites, self.options, most_stages, most_steps)

    def device(self, option: Option) -> Device:
        """One that an option is about."""
        return self.devices[option.site][0][option.place][0]

    def kinds(self, metric: Metric) -> list[Kind]:
        """The group of each option as the search knows it."""
        return [self.machine.kind(self.machine.group(self.device(one), one.degree), metric) for one in self.options]

    def placed(self, steps: Steps, pieces: Sequence[Piece]) -> tuple[tuple[Device, ...], tuple[Piece, ...]]:
        """The devices of stages that were found, one behind the other, and the stages on them."""
        taken: dict[tuple[int, int], Counts] = {}
        last: tuple[int, int] | None = None
        order: list[Device] = []
        found = []
        for piece in pieces:
            step = steps.every[piece.slot]
            option = self.options[step.option]
            if not step.near or last is None:
                last = self._node(option.site, step.taken, taken, last)
            before = taken.get(last, (0,) * len(self.sites[option.site].counts))
            first = before[option.place]
            found.append(piece._replace(slot=len(order)))
            order += self.devices[option.site][last[1]][option.place][first : first + option.degree]
            taken[last] = tuple(one + option.degree * (place == option.place) for place, one in enumerate(before))
        return tuple(order), tuple(found)

    def _node(
        self, site: int, wanted: Counts | int, taken: dict[tuple[int, int], Counts], last: tuple[int, int] | None
    ) -> tuple[int, int]:
        nothing = (0,) * len(self.sites[site].counts)
        for number in range(self.sites[site].nodes):
            if (site, number) != last and taken.get((site, number), nothing) == wanted:
                return site, number
        raise AssertionError("a step into a node that there is not")


def nodes_of(machine: Machine, devices: Sequence[Device]) -> Nodes:
    """The nodes that some devices are in, and every group that there may be."""
    sites: dict[object, list[tuple[tuple[Device, ...], ...]]] = {}
    for _, same in groupby(sorted(devices, key=lambda device: device.node), key=lambda device: device.node):
        by_class: dict[str, list[Device]] = {}
        for device in same:
            by_class.setdefault(device.kind, []).append(device)
        classes = sorted(by_class)
        node = machine.cluster.machine(by_class[classes[0]][0].node)
        key = (node.link, node.sums, tuple((kind, len(by_class[kind])) for kind in classes))
        sites.setdefault(key, []).append(tuple(tuple(by_class[kind]) for kind in classes))
    kept = tuple(tuple(nodes) for nodes in sites.values())
    counted = tuple(Site(len(nodes), tuple(map(len, nodes[0]))) for nodes in kept)
    return Nodes(machine=machine, devices=kept, sites=counted, options=tuple(_options(counted, machine.degrees)))


def _options(sites: Sequence[Site], degrees: Sequence[int]) -> Iterator[Option]:
    for number, site in enumerate(sites):
        for place, count in enumerate(site.counts):
            yield from (Option(number, place, degree) for degree in degrees if degree <= count)


@lru_cache(maxsize=8)
def _steps(sites: tuple[Site, ...], options: tuple[Option, ...], most_stages: int, most_steps: int) -> Steps | None:
    """Micro-batches and metrics share what they have in common."""
    return steps_in_any_order(sites, options, most_stages=most_stages, most_steps=most_steps)
