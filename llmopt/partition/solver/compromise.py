"""The best stages under several conditions at once, such as a least time for a token with a bound on the first. Exact.

What stages add up to, and the largest of them, for each thing that is asked about, is a label; of two labels of one
state and item, one that is nowhere smaller is dropped (Pareto). Labels are continued in the order of what they can
still become at best, so the first that is complete is the best (A*, Hart, Nilsson and Raphael 1968); those that can no
longer keep a condition are dropped.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmopt.partition.problem import SLACK, Array, Objective, Piece
from llmopt.partition.solver.ahead import Ahead

MOST_LABELS = 50_000

Indices = npt.NDArray[np.int64]


class _Label(NamedTuple):
    state: int
    item: int
    sums: tuple[float, ...]
    largest: tuple[float, ...]
    before: int  # the label that it continues
    step: int


class _Fan(NamedTuple):
    """Everything that may follow: steps and where their stages end; for each measure what these take, and what is left
    at least, [measures, ways]."""

    steps: Indices
    stops: Indices
    costs: Array
    rest_sums: Array
    rest_largest: Array


class Outcome(NamedTuple):
    """The best stages, if there are any, and what nothing that keeps the conditions is below."""

    pieces: list[Piece] | None
    bound: float


@dataclass(kw_only=True, eq=False)
class Compromise:
    """The first measure is made least, and all stay within their bounds."""

    ahead: Ahead
    degrees: Sequence[int]
    _labels: list[_Label] = field(default_factory=list, init=False)
    _fronts: dict[tuple[int, int], list[tuple[float, ...]]] = field(default_factory=dict, init=False)
    _fans: dict[tuple[int, int], _Fan] = field(default_factory=dict, init=False)
    _leaving: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self._leaving = [[] for _ in range(len(self.ahead.steps.levels))]
        for number, step in enumerate(self.ahead.steps.every):
            self._leaving[step.before].append(number)

    def solve(self) -> Outcome:
        """The best stages; none where nothing keeps the conditions, or where labels are too many to say."""
        items, ticket = self.ahead.kinds[0].items, count()
        zeros = (0.0,) * len(self.ahead.measures)
        first = _Label(0, 0, zeros, zeros, -1, -1)
        start = self._worth(*(rest[:, 0, 0] for rest in self.ahead.rests))
        queue = [(float(start), 0, next(ticket), first)] if math.isfinite(start) else []
        while queue:
            bound, _, _, label = heapq.heappop(queue)
            if self._is_beaten(label):
                continue
            if label.item == items:
                return Outcome(self._pieces(label), bound)
            if len(self._labels) >= MOST_LABELS:
                return Outcome(None, bound)
            self._labels.append(label)
            for value, new in self._continued(label, len(self._labels) - 1):
                if self._is_new(new):
                    heapq.heappush(queue, (value, -new.item, next(ticket), new))
        return Outcome(None, math.inf)

    def _continued(self, label: _Label, number: int) -> Iterator[tuple[float, _Label]]:
        fan = self._fan(label.state, label.item)
        sums = np.array(label.sums)[:, None] + fan.costs
        largest = np.maximum(np.array(label.largest)[:, None], fan.costs)
        values = self._worth(sums + fan.rest_sums, np.maximum(largest, fan.rest_largest))
        for place in np.flatnonzero(np.isfinite(values)).tolist():
            chosen = int(fan.steps[place])
            yield (
                float(values[place]),
                _Label(
                    self.ahead.steps.every[chosen].after,
                    int(fan.stops[place]),
                    tuple(sums[:, place].tolist()),
                    tuple(largest[:, place].tolist()),
                    number,
                    chosen,
                ),
            )

    def _fan(self, state: int, item: int) -> _Fan:
        """Everything that may follow a state and an item."""
        if (state, item) not in self._fans:
            parts = [self._part(number, item) for number in self._leaving[state]]
            stops = np.concatenate([np.array([], dtype=np.int64), *(stops for stops, _ in parts)])
            steps = np.repeat(np.array(self._leaving[state], dtype=np.int64), [len(stops) for stops, _ in parts])
            costs = np.concatenate([np.zeros((len(self.ahead.measures), 0)), *(costs for _, costs in parts)], axis=1)
            after = np.array([self.ahead.steps.every[number].after for number in steps.tolist()], dtype=np.int64)
            rest_sums, rest_largest = (rest[:, after, stops] for rest in self.ahead.rests)
            self._fans[state, item] = _Fan(steps, stops, costs, rest_sums, rest_largest)
        return self._fans[state, item]

    def _part(self, number: int, item: int) -> tuple[Indices, Array]:
        """Where a step's stage may end, and what it takes then, [measures, stops]."""
        kind = self.ahead.kind_of[number]
        stops = np.flatnonzero(self.ahead.allowed(number, kind)[item])
        costs = [
            one.times[kind][stops] - one.times[kind][item] + one.tolls[number] + (one.hops[number] if item else 0.0)
            for one in self.ahead.measures
        ]
        return stops, np.array(costs)

    def _worth(self, sums: Array, largest: Array) -> Array:
        """Of the first measure, where all are within their bounds; else infinite."""
        measures = self.ahead.measures
        values = [_values(one.objective, *both) for one, *both in zip(measures, sums, largest, strict=True)]
        kept = np.all([value <= one.at_most * (1 + SLACK) for one, value in zip(measures, values, strict=True)], 0)
        return np.where(kept, values[0], np.inf)

    def _dimensions(self, label: _Label) -> tuple[float, ...]:
        """What labels are compared by: the largest stage counts where there are several micro-batches."""
        pairs = zip(self.ahead.measures, label.largest, strict=True)
        several = (most for one, most in pairs if one.objective.micro_batches > 1)
        return (*label.sums, *several)

    def _is_beaten(self, label: _Label) -> bool:
        mine = self._dimensions(label)
        return mine not in self._fronts.get((label.state, label.item), [mine])

    def _is_new(self, label: _Label) -> bool:
        """Whether no label of its state and item is as good; those that it is as good as are dropped."""
        front = self._fronts.setdefault((label.state, label.item), [])
        mine = self._dimensions(label)
        for other in front:
            if all(one <= own * (1 + SLACK) for one, own in zip(other, mine, strict=True)):
                return False
        front[:] = [other for other in front if not all(own <= one for one, own in zip(other, mine, strict=True))]
        front.append(mine)
        return True

    def _pieces(self, label: _Label) -> list[Piece]:
        pieces: list[Piece] = []
        while label.before >= 0:
            before, kind = self._labels[label.before], self.ahead.kind_of[label.step]
            pieces.append(Piece(label.step, self.degrees[label.step], kind, before.item, label.item))
            label = before
        return pieces[::-1]


def _values(objective: Objective, totals: Array, largest: Array) -> Array:
    """Of many sums and largest stages, some of them infinite."""
    if objective.micro_batches == 1:
        return totals
    if objective.form == "rounds":
        return np.maximum(totals, objective.micro_batches * largest)
    return totals + (objective.micro_batches - 1) * largest
