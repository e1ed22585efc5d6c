"""What is ahead of the stages so far: how much the rest adds at least to each of several measures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from llmopt.partition.problem import SLACK, Array, Kind, Objective
from llmopt.partition.solver.steps import Steps

MOST_PAIRS = 150_000_000  # steps × pairs of items

Mask = npt.NDArray[np.bool_]
_Likeness = tuple[int, tuple[tuple[float, float], ...]]  # a kind, and hops and tolls of all measures


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measure:
    """Something that stages add up to: times by kind, a hop to each step's devices, and a toll for taking them."""

    objective: Objective
    times: Sequence[Array]
    hops: Array
    tolls: Array
    at_most: float = math.inf

    def most(self) -> float:
        """What no stage may be above."""
        return self.at_most / self.objective.micro_batches * (1 + SLACK)


@dataclass(kw_only=True, eq=False)
class Ahead:
    """A graph of steps, the kind that each takes into use, and what stages are measured by."""

    steps: Steps
    kinds: Sequence[Kind]
    kind_of: Sequence[int]
    measures: Sequence[Measure]
    _allowed: dict[_Likeness, Mask] = field(default_factory=dict, init=False)

    @property
    def affordable(self) -> bool:
        """Whether its tables are of a size that there is memory and time for."""
        return len(self.steps.every) * (self.kinds[0].items + 1) ** 2 <= MOST_PAIRS

    def allowed(self, step: int, kind: int) -> Mask:
        """Whether a stage may be from one item to another: it fits, and no measure is above its bound."""
        key = self._likeness(step, kind)
        if key not in self._allowed:
            places = np.arange(self.kinds[kind].items + 1)
            allowed = (places[None] > places[:, None]) & (places[None] <= self.kinds[kind].far[:, None])
            for one in self.measures:
                allowed &= self._square(one, step, kind) <= one.most()
            self._allowed[key] = allowed
        return self._allowed[key]

    def _likeness(self, step: int, kind: int) -> _Likeness:
        """Steps that have this in common take the same."""
        return kind, tuple((float(one.hops[step]), float(one.tolls[step])) for one in self.measures)

    def _square(self, one: Measure, step: int, kind: int) -> Array:
        """What a stage takes from one item to another, [items + 1, items + 1]."""
        time = one.times[kind]
        hop = np.where(np.arange(len(time)) > 0, one.hops[step], 0.0)[:, None]
        whole: Array = time[None] - time[:, None] + one.tolls[step] + hop
        return whole

    @cached_property
    def rests(self) -> tuple[Array, Array]:
        """What the items from each on take at least behind each state, and the least largest: [measures, states,
        items + 1]."""
        size = self.kinds[0].items + 1
        sums = np.full((len(self.measures), len(self.steps.levels), size), np.inf)
        sums[:, :, -1] = 0.0
        largest = sums.copy()
        squares: dict[tuple[int, _Likeness], Array] = {}
        for number in sorted(range(len(self.steps.every)), key=lambda number: -self.steps.every[number].before):
            step, kind = self.steps.every[number], self.kind_of[number]
            for place, one in enumerate(self.measures):
                key = (place, self._likeness(number, kind))
                if key not in squares:
                    squares[key] = np.where(self.allowed(number, kind), self._square(one, number, kind), np.inf)
                for rest, join in ((sums, np.add), (largest, np.maximum)):
                    new = join(squares[key], rest[place, step.after][None]).min(axis=1)
                    np.minimum(rest[place, step.before], new, out=rest[place, step.before])
        return sums, largest
