"""Stages along a graph of steps, each of which takes a group of devices into use. Exact.

`sums[s, i]` is the least sum of stages that take the first i items with what state s has in use.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmopt.partition.problem import Array, Kind, Piece
from llmopt.partition.solver.steps import Step, Steps
from llmopt.partition.solver.window import first_items, window_minimum

Indices = npt.NDArray[np.int64]
Firsts = dict[tuple[int, float], Indices]  # by kind and hop: where a stage may begin at the earliest


class _Batch(NamedTuple):
    """Steps with one kind and hop to states of one level: each target's steps begin at `starts`."""

    kind: int
    hop_s: float
    before: Indices
    targets: Indices
    starts: Indices


@dataclass(kw_only=True, eq=False)
class Stepwise:
    """A graph, and what each step takes into use, and the hop to it. A piece's slot is the number of its step."""

    steps: Steps
    kinds: Sequence[Kind]
    kind_of: Sequence[int]
    degrees: Sequence[int]
    hops_s: Sequence[float]
    most_stages: int
    _batches: list[_Batch] = field(init=False)
    _into: dict[int, list[int]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for number, step in enumerate(self.steps.every):
            self._into.setdefault(step.after, []).append(number)

        def key(number: int) -> tuple[int, int, float, int]:
            step = self.steps.every[number]
            hop_s = self.hops_s[number] if step.before else 0.0
            return self.steps.levels[step.after], self.kind_of[number], hop_s, step.after

        numbers = sorted(range(len(self.steps.every)), key=key)
        self._batches = [
            _batch(kind, hop_s, [self.steps.every[number] for number in same])
            for (_, kind, hop_s), same in groupby(numbers, key=lambda number: key(number)[:3])
        ]

    def longest_s(self) -> float:
        """Everything on the slowest, and the longest hop."""
        return max(float(kind.time[-1]) for kind in self.kinds) + max(self.hops_s)

    def seconds(self, pieces: Sequence[Piece]) -> list[float]:
        """What each stage takes."""
        return [
            float(self.kinds[piece.kind].time[piece.stop] - self.kinds[piece.kind].time[piece.first])
            + (self.hops_s[piece.slot] if piece.first else 0.0)
            for piece in pieces
        ]

    def within(self, seconds: float) -> list[Piece] | None:
        """Stages of at most so many seconds, or None."""
        found = self.least_sum(seconds)
        return found[0] if found is not None else None

    def least_sum(self, limit: float = math.inf) -> tuple[list[Piece], float] | None:
        """Stages whose sum is least, none above `limit`, and that sum."""
        size = self.kinds[0].items + 1
        sums = np.full((len(self.steps.levels), size), np.inf)
        sums[0, 0] = 0.0
        firsts: Firsts = {}
        for batch in self._batches:
            key, kind = (batch.kind, batch.hop_s), self.kinds[batch.kind]
            if key not in firsts:
                firsts[key] = first_items(kind, limit - batch.hop_s)
            found = window_minimum(sums[batch.before] - kind.time, firsts[key]) + (kind.time + batch.hop_s)
            least = np.minimum.reduceat(found, batch.starts, axis=0)
            sums[batch.targets] = np.minimum(sums[batch.targets], least)
        state = int(sums[:, -1].argmin())
        total = float(sums[state, -1])
        return (self._trace(state, sums, firsts), total) if math.isfinite(total) else None

    def _trace(self, state: int, sums: Array, firsts: Firsts) -> list[Piece]:
        pieces: list[Piece] = []
        stop = self.kinds[0].items
        while stop:
            pieces.append(min(self._last(number, stop, sums, firsts) for number in self._into[state])[1])
            state, stop = self.steps.every[pieces[-1].slot].before, pieces[-1].first
        return pieces[::-1]

    def _last(self, number: int, stop: int, sums: Array, firsts: Firsts) -> tuple[float, Piece]:
        """The best sum behind a step whose stage ends before an item, and that stage."""
        before, kind = self.steps.every[number].before, self.kinds[self.kind_of[number]]
        hop_s = self.hops_s[number] if before else 0.0
        low = int(firsts[self.kind_of[number], hop_s][stop])
        costs = sums[before, low:stop] - kind.time[low:stop] + kind.time[stop] + hop_s
        place = int(costs.argmin()) if len(costs) else 0
        least = float(costs[place]) if len(costs) else math.inf
        return least, Piece(number, self.degrees[number], self.kind_of[number], low + place, stop)


def _batch(kind: int, hop_s: float, steps: Sequence[Step]) -> _Batch:
    after = np.array([step.after for step in steps], dtype=np.int64)
    targets, starts = np.unique(after, return_index=True)
    before = np.array([step.before for step in steps], dtype=np.int64)
    return _Batch(kind, hop_s, before, targets, starts)
