"""All that a plan is searched for under: which devices, replicas, numbers of micro-batches, tensor-parallel degrees."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llmopt.errors import UsageError, near_match
from llmopt.partition.cluster import Cluster, Device
from llmopt.partition.cost import Costs, cut
from llmopt.partition.machine import Machine, share
from llmopt.partition.plan import Workload
from llmopt.partition.wanted import Model, Wanted

_MOST_PARTS = 64
_MOST_SEQUENCES = 256  # of more, micro-batches are powers of two


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A machine, and the devices of one of its replicas."""

    machine: Machine
    devices: tuple[Device, ...]


@dataclass(kw_only=True, eq=False)
class Settings:
    """The settings for one model on one cluster under one workload."""

    model: Model
    cluster: Cluster
    workload: Workload
    wanted: Wanted
    _machines: dict[tuple[int, int, tuple[int, ...]], Machine] = field(default_factory=dict, init=False)

    def devices(self) -> list[Device]:
        """All that may be used, in the order that was asked for.

        Raises:
            UsageError: the order has what the cluster has not, or has it twice.
        """
        everyone = self.cluster.all_devices()
        if self.wanted.order is None:
            return list(everyone)
        named = {device.name: device for device in everyone}
        if len(set(self.wanted.order)) < len(self.wanted.order):
            raise UsageError("a device is there twice", where="--order")
        for name in self.wanted.order:
            if name not in named:
                raise UsageError(f"there is no device {name!r}", where="--order", hint=near_match(name, named))
        return [named[name] for name in self.wanted.order]

    def degrees(self, devices: Sequence[Device]) -> list[int]:
        """The tensor-parallel degrees that divide the model and that a node has devices for.

        Raises:
            UsageError: the one that was asked for is none of these.
        """
        largest = max(Counter((device.kind, device.node) for device in devices).values())
        legal = [one for one in range(1, largest + 1) if self.model.shared_by(one).legal]
        asked = self.wanted.degree
        if asked is None:
            return legal
        entry = self.model.shared_by(asked)
        if not entry.legal:
            every = [one for one in range(1, 65) if self.model.shared_by(one).legal]
            hint = f"legal degrees: {', '.join(map(str, every))}"
            raise UsageError(f"a tensor-parallel degree of {asked}: {entry.obstacle}", where="--tp", hint=hint)
        if asked > largest:
            what = f"a tensor-parallel degree of {asked}, where no node has more than {largest} devices of a class"
            fitting = [one for one in legal if one <= largest]
            raise UsageError(what, where="--tp", hint=f"there is room for {', '.join(map(str, fitting))}")
        return [asked]

    def machine(self, replicas: int, count: int, degrees: Sequence[int]) -> Machine:
        """The model at work in so many copies, and micro-batches."""
        key = (replicas, count, tuple(degrees))
        if key not in self._machines:
            costs = Costs(
                spec=self.model.spec,
                precision=self.model.precision,
                workload=self.workload,
                cut=cut(count, self.sequences(replicas)),
            )
            self._machines[key] = Machine(cluster=self.cluster, costs=costs, degrees=degrees, replicas=replicas)
        return self._machines[key]

    def sequences(self, replicas: int) -> int:
        """Of one replica."""
        return -(-self.workload.batch // replicas)

    def each(self, devices: Sequence[Device], degrees: Sequence[int]) -> Iterator[Setting]:
        """Every setting.

        Raises:
            UsageError: what was asked for cannot be.
        """
        asked = self.wanted.replicas
        for replicas in [asked] if asked else powers(min(self.workload.batch, len(devices))):
            mine = share(self.cluster, devices, replicas)
            if mine is not None:
                for count in self._counts(self.sequences(replicas)):
                    yield Setting(machine=self.machine(replicas, count, degrees), devices=tuple(mine))
            elif asked:
                what = f"the devices do not divide into {asked} replicas that are alike"
                raise UsageError(what, where="--replicas", hint="give a number that divides each node's, or the nodes")

    def _counts(self, sequences: int) -> list[int]:
        asked, prompt = self.wanted.micro_batches, self.workload.prompt
        if asked is not None:
            if asked > max(sequences, prompt):
                what = f"{asked} micro-batches of {sequences} × {prompt} tokens"
                raise UsageError(what, where="--micro-batches", hint=f"at most {max(sequences, prompt)} are not empty")
            return [asked]
        metrics = {self.wanted.objective, *(promise.metric for promise in self.wanted.promises)}
        if sequences == 1 and "ttft" in metrics:
            return powers(min(prompt, _MOST_PARTS))
        return useful_counts(sequences) if sequences <= _MOST_SEQUENCES else powers(sequences)


def useful_counts(sequences: int) -> list[int]:
    """Numbers of micro-batches with a size of their own: of two with the same largest one, the fewer are better."""
    return sorted({-(-sequences // size) for size in range(1, sequences + 1)})


def powers(most: int) -> list[int]:
    """The powers of two up to a number, and itself."""
    return sorted({*(1 << place for place in range(most.bit_length())), most})
