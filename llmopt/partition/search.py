"""From a model, a cluster and a workload to the best plan: replicas, micro-batches, degrees, orders, stages."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

from llmopt.errors import BudgetError, UsageError, near_match
from llmopt.model.parallel import tensor_parallel
from llmopt.model.spec import ModelSpec
from llmopt.partition.cluster import Cluster, Device, to_json
from llmopt.partition.cost import Costs, Precision, cut
from llmopt.partition.machine import Machine, Metric, share
from llmopt.partition.obstacles import explain
from llmopt.partition.orders import Solution, solve_any_order, solve_order
from llmopt.partition.plan import Plan, Predicted, Stage, Workload
from llmopt.partition.problem import Piece
from llmopt.words import counted

ObjectiveName = Literal["ttft", "tpot", "throughput", "devices", "price"]
OBJECTIVES: tuple[ObjectiveName, ...] = ("ttft", "tpot", "throughput", "devices", "price")

_SLO = re.compile(r"(?P<metric>\w+)\s*(?P<sign><=|>=)\s*(?P<bound>\d+(?:\.\d+)?)")
_METRICS: dict[str, Metric] = {"ttft_ms": "ttft", "tpot_ms": "tpot", "throughput_tokens_per_s": "throughput"}
_MOST_PARTS = 64
_MOST_PURCHASES = 3000


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A bound on a prediction, such as `ttft_ms<=300`."""

    metric: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{'>=' if self.metric == 'throughput_tokens_per_s' else '<='}{self.bound:g}"

    def kept(self, predicted: Predicted) -> bool:
        """Whether a plan keeps it."""
        value: float = getattr(predicted, self.metric)
        return value >= self.bound if self.metric == "throughput_tokens_per_s" else value <= self.bound


def parse_promise(text: str) -> Promise:
    """Read a promise.

    Raises:
        UsageError: it is none.
    """
    match = _SLO.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no promise", where="--slo", hint="write 'ttft_ms<=300'")
    if match["metric"] not in _METRICS:
        raise UsageError(f"there is no {match['metric']!r}", where="--slo", hint=near_match(match["metric"], _METRICS))
    promise = Promise(metric=match["metric"], bound=float(match["bound"]))
    if match["sign"] not in str(promise):
        raise UsageError(f"{text!r} promises the wrong way round", where="--slo", hint=f"write '{promise}'")
    return promise


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked of a plan. None: whatever is best."""

    objective: ObjectiveName = "tpot"
    promises: tuple[Promise, ...] = ()
    micro_batches: int | None = None
    replicas: int | None = None
    degree: int | None = None
    order: tuple[str, ...] | None = None
    split: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is to be divided: what it is called, what it is, and in which numbers it computes."""

    name: str
    spec: ModelSpec
    precision: Precision
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan on the way to be one."""

    machine: Machine
    devices: tuple[Device, ...]
    stages: tuple[Stage, ...]
    predicted: Predicted
    bound: float


@dataclass(kw_only=True, eq=False)
class Search:
    """The search for one model on one cluster under one workload."""

    model: Model
    cluster: Cluster
    workload: Workload
    wanted: Wanted
    _machines: dict[tuple[int, int, tuple[int, ...]], Machine] = field(default_factory=dict, init=False)

    def plan(self) -> Plan:
        """The best plan.

        Raises:
            UsageError: what was asked for contradicts the model or the cluster.
            BudgetError: no plan fits, or none keeps the promises; with the nearest change.
        """
        devices = self._devices()
        degrees = self._degrees(devices)
        if self.wanted.split is not None:
            candidate = self._own_split(devices, self.wanted.split)
        elif self.wanted.objective in {"devices", "price"}:
            candidate = self._cheapest(devices, degrees)
        else:
            candidate = self._best(devices, degrees, _metric(self.wanted.objective))
        return self._finished(candidate, devices)

    def _devices(self) -> list[Device]:
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

    def _degrees(self, devices: Sequence[Device]) -> list[int]:
        largest = max(Counter((device.kind, device.node) for device in devices).values())
        legal = [one for one in range(1, largest + 1) if tensor_parallel(self.model.spec, one).legal]
        asked = self.wanted.degree
        if asked is None:
            return legal
        entry = tensor_parallel(self.model.spec, asked)
        if not entry.legal:
            every = [one for one in range(1, 65) if tensor_parallel(self.model.spec, one).legal]
            hint = f"legal degrees: {', '.join(map(str, every))}"
            raise UsageError(f"a tensor-parallel degree of {asked}: {entry.obstacle}", where="--tp", hint=hint)
        if asked > largest:
            what = f"a tensor-parallel degree of {asked}, where no node has more than {largest} devices of a class"
            raise UsageError(what, where="--tp")
        return [asked]

    def _machine(self, replicas: int, count: int, degrees: Sequence[int]) -> Machine:
        key = (replicas, count, tuple(degrees))
        if key not in self._machines:
            sequences = -(-self.workload.batch // replicas)
            costs = Costs(
                spec=self.model.spec,
                precision=self.model.precision,
                workload=self.workload,
                cut=cut(count, sequences),
            )
            self._machines[key] = Machine(cluster=self.cluster, costs=costs, degrees=degrees, replicas=replicas)
        return self._machines[key]

    def _settings(self, devices: Sequence[Device], metric: Metric) -> Iterator[tuple[int, int, list[Device]]]:
        """Replicas, micro-batches and the devices of one replica."""
        most = min(self.workload.batch, len(devices))
        asked = self.wanted.replicas
        for replicas in [asked] if asked else _powers(most):
            mine = share(self.cluster, devices, replicas)
            if mine is None:
                if asked:
                    what = f"the devices do not divide into {asked} replicas that are alike"
                    raise UsageError(what, where="--replicas")
                continue
            sequences = -(-self.workload.batch // replicas)
            for count in self._counts(sequences, metric):
                yield replicas, count, mine

    def _counts(self, sequences: int, metric: Metric) -> list[int]:
        asked, prompt = self.wanted.micro_batches, self.workload.prompt
        if asked is not None:
            if asked > max(sequences, prompt):
                what = f"{asked} micro-batches of {sequences} × {prompt} tokens"
                raise UsageError(what, where="--micro-batches", hint=f"at most {max(sequences, prompt)} are not empty")
            return [asked]
        counts = _powers(sequences)
        if metric == "ttft" and sequences == 1:
            counts = _powers(min(prompt, _MOST_PARTS))
        return counts

    def _best(self, devices: Sequence[Device], degrees: Sequence[int], metric: Metric) -> Candidate:
        found = self._found(devices, degrees, metric)
        if found is None:
            raise explain(self._machine(1, 1, degrees), devices)
        if self._keeps(found):
            return found
        others = [self._found(devices, degrees, _METRICS[promise.metric]) for promise in self.wanted.promises]
        keeping = [other for other in others if other is not None and self._keeps(other)]
        if keeping:
            return min(keeping, key=lambda one: _value(one, metric))
        raise self._broken(found, others)

    def _broken(self, found: Candidate, others: Sequence[Candidate | None]) -> BudgetError:
        broken = next(promise for promise in self.wanted.promises if not promise.kept(found.predicted))
        nearest = min((getattr(one.predicted, broken.metric), one) for one in [found] for _ in (0,))[0]
        for other in others:
            if other is not None:
                value = getattr(other.predicted, broken.metric)
                nearest = max(nearest, value) if broken.metric.startswith("throughput") else min(nearest, value)
        hint = f"what comes nearest has {nearest:.4g}; add devices, or lower --prompt or --batch"
        return BudgetError(f"no plan keeps {broken}", where="--slo", hint=hint)

    def _keeps(self, candidate: Candidate) -> bool:
        return all(promise.kept(candidate.predicted) for promise in self.wanted.promises)

    def _found(self, devices: Sequence[Device], degrees: Sequence[int], metric: Metric) -> Candidate | None:
        best: Candidate | None = None
        bound = math.inf
        for replicas, count, mine in self._settings(devices, metric):
            machine = self._machine(replicas, count, degrees)
            limit_s = _limit_s(best, machine, metric) if best is not None and not self.wanted.promises else math.inf
            if self.wanted.order is not None:
                solution = solve_order(machine, mine, metric, limit_s)
            else:
                solution = solve_any_order(machine, mine, metric, limit_s)
            if solution is None:
                continue
            candidate = self._candidate(machine, solution, metric)
            bound = min(bound, candidate.bound)
            keeps_more = best is not None and self._keeps(candidate) and not self._keeps(best)
            better = best is None or _value(candidate, metric) < _value(best, metric)
            if keeps_more or (better and (best is None or self._keeps(candidate) or not self._keeps(best))):
                best = candidate
        return None if best is None else replace(best, bound=bound)

    def _candidate(self, machine: Machine, solution: Solution, metric: Metric) -> Candidate:
        stages = machine.stages(solution.devices, solution.pieces)
        predicted = machine.predicted(stages)
        candidate = Candidate(machine=machine, devices=solution.devices, stages=stages, predicted=predicted, bound=0.0)
        return replace(candidate, bound=_value(candidate, metric) * min(solution.bound / solution.value, 1.0))

    def _own_split(self, devices: Sequence[Device], split: Sequence[int]) -> Candidate:
        blocks, degree = len(self.model.spec.blocks), self.wanted.degree or 1
        if split[0] < 1 or min(split) < 0:
            raise UsageError("the first stage has a block, for it has the embedding", where="--split")
        if sum(split) != blocks:
            what = f"{'+'.join(map(str, split))} are {sum(split)} blocks, and the model has {blocks}"
            raise UsageError(what, where="--split", hint="their sum is the number of blocks")
        if len(split) * degree > len(devices):
            what = f"{counted(len(split), 'stage')} of {counted(degree, 'device')}, where there are {len(devices)}"
            raise UsageError(what, where="--split", hint="give fewer stages, or more devices")
        sequences = -(-self.workload.batch // (self.wanted.replicas or 1))
        count = self.wanted.micro_batches or min(sequences, len(split))
        machine = self._machine(self.wanted.replicas or 1, count, [degree])
        pieces = divided(split, degree)
        for piece in pieces:
            group = devices[piece.slot : piece.slot + degree]
            if len({(device.kind, device.node) for device in group}) > 1:
                what = f"{', '.join(device.name for device in group)} are not of one class and node"
                raise UsageError(what, where="--order", hint="a stage's devices are alike, and in one node")
        stages = machine.stages(devices, pieces)
        if not machine.fits(stages):
            raise explain(machine, devices, stages)
        predicted = machine.predicted(stages)
        return Candidate(machine=machine, devices=tuple(devices), stages=stages, predicted=predicted, bound=0.0)

    def _cheapest(self, devices: Sequence[Device], degrees: Sequence[int]) -> Candidate:
        """Purchases from the cheapest on; the first that fits and keeps the promises."""
        metric = _METRICS[self.wanted.promises[0].metric] if self.wanted.promises else "tpot"
        for purchase in self._purchases(devices):
            candidate = self._found(purchase, degrees, metric)
            if candidate is None:
                continue
            if not self._keeps(candidate):
                others = [self._found(purchase, degrees, _METRICS[one.metric]) for one in self.wanted.promises[1:]]
                kept = [one for one in others if one is not None and self._keeps(one)]
                if not kept:
                    continue
                candidate = kept[0]
            return replace(candidate, bound=self._cost(candidate.machine, candidate.stages))
        found = self._best(devices, degrees, metric)  # says what is in the way
        return replace(found, bound=0.0)

    def _purchases(self, devices: Sequence[Device]) -> list[list[Device]]:
        by_kind: dict[str, list[Device]] = {}
        for device in devices:
            by_kind.setdefault(device.kind, []).append(device)
        counts = [range(len(of_kind) + 1) for of_kind in by_kind.values()]
        if math.prod(map(len, counts)) > _MOST_PURCHASES:
            what = f"more than {_MOST_PURCHASES:,} ways to choose among {counted(len(devices), 'device')}"
            raise UsageError(what, where="--objective", hint="give a smaller cluster, or fewer classes")
        machine = self._machine(1, 1, [1])
        needed = memory_needed(machine, devices)
        found = []
        for chosen in product(*counts):
            bought = [
                device for many, of_kind in zip(chosen, by_kind.values(), strict=True) for device in of_kind[:many]
            ]
            there = sum(self.cluster.device_class(device.kind).usable_bytes for device in bought)
            if bought and there >= needed:
                found.append((self._price(bought), len(bought), sorted(bought, key=devices.index)))
        return [bought for _, _, bought in sorted(found, key=lambda one: one[:2])]

    def _price(self, devices: Sequence[Device]) -> float:
        if self.wanted.objective == "devices":
            return float(len(devices))
        prices = {kind: self.cluster.device_class(kind).price_per_hour for kind in {device.kind for device in devices}}
        missing = [kind for kind, price in prices.items() if price is None]
        if missing:
            what = f"nothing is known of the price of {missing[0]}"
            raise UsageError(what, where=f"devices.{missing[0]}", hint="add price_per_hour to the cluster file")
        return sum(prices[device.kind] or 0.0 for device in devices)

    def _cost(self, machine: Machine, stages: Sequence[Stage]) -> float:
        named = {device.name: device for device in self.cluster.all_devices()}
        used = [named[name] for stage in stages for name in stage.devices]
        return self._price(used) * machine.replicas

    def _finished(self, candidate: Candidate, devices: Sequence[Device]) -> Plan:
        machine, objective = candidate.machine, self.wanted.objective
        if objective in {"devices", "price"}:
            value = self._cost(machine, candidate.stages)
        else:
            value = _value(candidate, _metric(objective))
        own = self.wanted.split is not None
        bound = self._found_bound(devices) if own else min(candidate.bound, value)
        used = {name for stage in candidate.stages for name in stage.devices}
        mine = share(self.cluster, devices, machine.replicas) or []
        return Plan(
            model=self.model.name,
            revision=self.model.revision,
            cluster=to_json(self.cluster),
            objective=objective,
            workload=self.workload,
            dtype=self.model.precision.dtype,
            schemes={name: scheme.name for name, scheme in self.model.precision.schemes.items()},
            micro_batches=machine.costs.cut.count,
            replicas=machine.replicas,
            stages=candidate.stages,
            predicted=candidate.predicted,
            baselines={
                "even_split": self._even(machine, candidate, mine),
                "single_device": self._single(machine, mine),
            },
            value=value,
            lower_bound_ms=bound,
            gap=None if bound is None or not value else max(value - bound, 0.0) / value,
            unused=tuple(device.name for device in mine if device.name not in used),
            notes=self._notes(machine),
        )

    def _found_bound(self, devices: Sequence[Device]) -> float | None:
        """What the best plan for the same devices takes."""
        if self.wanted.objective in {"devices", "price"}:
            return None
        metric = _metric(self.wanted.objective)
        open_search = Search(
            model=self.model,
            cluster=self.cluster,
            workload=self.workload,
            wanted=replace(self.wanted, split=None, promises=()),
        )
        found = open_search._found(devices, open_search._degrees(devices), metric)
        return None if found is None else found.bound

    def _even(self, machine: Machine, candidate: Candidate, mine: Sequence[Device]) -> Predicted | None:
        """As many blocks for everyone: for the groups of the plan, or for all devices if that is one group."""
        blocks = len(self.model.spec.blocks)
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
            piece._replace(slot=start, degree=degree)
            for piece, start, degree in zip(pieces, starts, degrees, strict=True)
        ]
        stages = machine.stages(order, placed)
        return machine.predicted(stages) if machine.fits(stages) else None

    def _single(self, machine: Machine, mine: Sequence[Device]) -> Predicted | None:
        """The quickest of the devices by itself, its batch whole."""
        alone = self._machine(machine.replicas, 1, [1])
        found = []
        for device in {device.kind: device for device in mine}.values():
            stages = alone.stages([device], [Piece(0, 1, 0, 0, alone.costs.items)])
            if alone.fits(stages):
                found.append(alone.predicted(stages))
        return min(found, key=lambda one: one.tpot_ms, default=None)

    def _notes(self, machine: Machine) -> tuple[str, ...]:
        notes = []
        kinds = sorted({device.kind for device in self.cluster.all_devices()})
        guessed = [kind for kind in kinds if self.cluster.device_class(kind).source == "data sheet"]
        if guessed:
            notes.append(f"from data sheets, not measured: {', '.join(guessed)}")
        schemes = {scheme.name for scheme in machine.costs.precision.schemes.values() if scheme.activation_bits == 16}
        dtype = self.model.precision.dtype
        notes += [f"{one}, where its speed is not known, is computed in {dtype}" for one in sorted(schemes)]
        return tuple(notes)


def divided(split: Sequence[int], degree: int) -> list[Piece]:
    """So many blocks for each group; the embedding for the first, the head for the last."""
    pieces, first = [], 0
    for number, blocks in enumerate(split):
        stop = first + blocks + (number == len(split) - 1)
        pieces.append(Piece(number * degree, degree, 0, first, stop))
        first = stop
    return pieces


def memory_needed(machine: Machine, devices: Sequence[Device]) -> float:
    """Weights and cache, wherever they are; a tied table once."""
    costs = machine.item_costs(machine.group(devices[0], 1))
    return float(costs.weight_bytes.sum() + costs.kv_bytes.sum()) - costs.tied_bytes


def _metric(objective: ObjectiveName) -> Metric:
    assert objective in {"ttft", "tpot", "throughput"}
    return objective


def _value(candidate: Candidate, metric: Metric) -> float:
    """Milliseconds: to the first token, for each token, or for each token of all sequences together."""
    if metric == "ttft":
        return candidate.predicted.ttft_ms
    if metric == "tpot":
        return candidate.predicted.tpot_ms
    return 1000 / candidate.predicted.throughput_tokens_per_s


def _limit_s(best: Candidate, machine: Machine, metric: Metric) -> float:
    """What a plan for a machine must be below to be better, in the seconds that the search counts."""
    tokens = machine.replicas * machine.costs.cut.sequences * machine.costs.workload.output
    return _value(best, metric) / 1000 * (tokens if metric == "throughput" else 1)


def _powers(most: int) -> list[int]:
    return sorted({*(1 << place for place in range(most.bit_length())), most})
