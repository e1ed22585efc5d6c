"""Stages for a few classes of devices in whatever order is best. Exact, where hops depend on that alone.

In general the best order is NP-hard to find (Pinar, Tabak and Aykanat, J. Parallel Distrib. Comput. 68 (2008)). Devices
of one class are alike, so only how many of each are used counts: how far they get, or their least sums, by counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmopt.partition.problem import SLACK, Array, Kind, Piece
from llmopt.partition.solver.window import first_items, window_minimum

MOST_STATES = 6_000_000
MOST_SUMS = 30_000_000

Indices = npt.NDArray[np.int64]


class Grouping(NamedTuple):
    """A kind of group: of which class it takes how many of what `counts` counts, and how many devices that is."""

    place: int
    units: int
    degree: int


@dataclass(kw_only=True, eq=False)
class AnyOrder:
    """Classes: how many units there are of each, the groups that units make, one for each kind, and the hop to each."""

    kinds: Sequence[Kind]
    groupings: Sequence[Grouping]
    counts: Sequence[int]
    hops_s: Sequence[float]

    @property
    def most_stages(self) -> int:
        """A stage has a group and an item at least."""
        return min(sum(self.counts), self.kinds[0].items)

    @property
    def states(self) -> int:
        """An upper bound of how many counts there are to go through."""
        return math.prod(most + 1 for most in self._most_units)

    @property
    def _most_units(self) -> list[int]:
        """Of each class: a stage has an item at least."""
        items, found = self.kinds[0].items, [0] * len(self.counts)
        for grouping in self.groupings:
            most = self.counts[grouping.place] // grouping.units * grouping.units
            found[grouping.place] = max(found[grouping.place], min(most, items * grouping.units))
        return found

    @property
    def _most_in_all(self) -> int:
        return min(sum(self._most_units), self.kinds[0].items * max(one.units for one in self.groupings))

    @property
    def can_sum(self) -> bool:
        """Whether there is memory for the least sums of all counts."""
        return self.states <= MOST_STATES and len(self._table[0]) * (self.kinds[0].items + 1) <= MOST_SUMS

    def longest_s(self) -> float:
        """Everything on the slowest, and a hop."""
        return max(float(kind.time[-1]) for kind in self.kinds) + max(self.hops_s)

    def seconds(self, pieces: Sequence[Piece]) -> list[float]:
        """What each stage takes."""
        return [
            float(self.kinds[piece.kind].time[piece.stop] - self.kinds[piece.kind].time[piece.first])
            + (self.hops_s[piece.kind] if number else 0.0)
            for number, piece in enumerate(pieces)
        ]

    def within(self, seconds: float) -> list[Piece] | None:
        """Stages of at most so many seconds, or None."""
        befores, levels = self._table
        jumps = np.stack([self._jumps(*one, seconds) for one in zip(self.kinds, self.hops_s, strict=True)])
        every = np.arange(len(self.kinds))
        items = self.kinds[0].items
        reached = np.zeros(len(befores) + 1, dtype=np.int64)
        reached[-1] = items + 1  # of counts that do not exist: nothing comes from there
        for level in levels:
            furthest = jumps[every, reached[befores[level]]].max(axis=1)
            reached[level] = furthest
            best = int(furthest.argmax())
            if furthest[best] == items:
                return self._trace(level.start + best, reached, jumps)
        return None

    def least_sum(self, limit: float = math.inf) -> tuple[list[Piece], float] | None:
        """Stages whose sum is least, none above `limit`, and that sum."""
        befores, levels = self._table
        size = self.kinds[0].items + 1
        sums = np.full((len(befores) + 1, size), np.inf)
        later = [first_items(kind, limit - hop_s) for kind, hop_s in zip(self.kinds, self.hops_s, strict=True)]
        for level in levels:
            for number, kind in enumerate(self.kinds):
                before = befores[level, number]
                there = np.flatnonzero(before > 0)
                found = window_minimum(sums[before[there]] - kind.time, later[number]) + kind.time + self.hops_s[number]
                sums[level.start + there] = np.minimum(sums[level.start + there], found)
                for state in (level.start + np.flatnonzero(before == 0)).tolist():
                    np.minimum(sums[state], self._begun(number, limit), out=sums[state])
        best = int(sums[:, -1].argmin())
        total = float(sums[best, -1])
        return (self._trace_sums(best, sums, limit), total) if math.isfinite(total) else None

    def _begun(self, number: int, limit: float) -> Array:
        """The first stage, behind no hop, [items + 1]."""
        kind = self.kinds[number]
        reach = kind.reach(0, limit)
        places = np.arange(kind.items + 1)
        return np.where((places > 0) & (places <= reach), kind.time - kind.time[0], np.inf)

    @cached_property
    def _table(self) -> tuple[Indices, list[slice]]:
        """For all counts, by their sum: the counts without each grouping, [states, groupings]; and where each sum
        begins and ends."""
        most, most_in_all = self._most_units, self._most_in_all
        grid = np.indices([count + 1 for count in most]).reshape(len(most), -1)
        totals = grid.sum(axis=0)
        strides = np.array([math.prod(count + 1 for count in most[place + 1 :]) for place in range(len(most))])
        chosen = np.flatnonzero(totals <= most_in_all)
        chosen = chosen[np.argsort(totals[chosen], kind="stable")]
        number = np.full(grid.shape[1], -1)
        number[chosen] = np.arange(len(chosen))
        befores = np.full((len(chosen), len(self.groupings)), -1)
        for column, (place, units, _) in enumerate(self.groupings):
            there = grid[place, chosen] >= units
            befores[there, column] = number[chosen[there] - units * strides[place]]
        ends = np.searchsorted(totals[chosen], np.arange(most_in_all + 2))
        return befores, [slice(int(ends[one]), int(ends[one + 1])) for one in range(1, most_in_all + 1)]

    def _jumps(self, kind: Kind, hop_s: float, seconds: float) -> Indices:
        """How far a stage goes from each item, [items + 2]; nowhere from what does not exist."""
        seconds_left = seconds - hop_s
        jump = np.zeros(kind.items + 2, dtype=np.int64)
        if seconds_left >= 0:
            in_time = np.searchsorted(kind.time, kind.time + seconds_left * (1 + SLACK), side="right") - 1
            jump[:-1] = np.minimum(in_time, kind.far)
        jump[0] = kind.reach(0, seconds)
        return jump

    def _trace(self, state: int, reached: Indices, jumps: Indices) -> list[Piece]:
        befores, _ = self._table
        found: list[tuple[int, int, int]] = []
        while reached[state]:
            stop = int(reached[state])
            for number, jump in enumerate(jumps):
                before = int(befores[state, number])
                if before >= 0 and jump[reached[before]] == stop:
                    found.append((number, int(reached[before]), stop))
                    state = before
                    break
        return self._numbered(found)

    def _trace_sums(self, state: int, sums: Array, limit: float) -> list[Piece]:
        befores, _ = self._table
        found: list[tuple[int, int, int]] = []
        stop = self.kinds[0].items
        while stop:
            number, first = self._last(state, stop, sums, limit)
            found.append((number, first, stop))
            state, stop = int(befores[state, number]), first
        return self._numbered(found)

    def _last(self, state: int, stop: int, sums: Array, limit: float) -> tuple[int, int]:
        """Kind and first item of the stage that comes last."""
        befores, _ = self._table
        value = sums[state, stop]
        for number, kind in enumerate(self.kinds):
            before = int(befores[state, number])
            if before == 0 and math.isclose(self._begun(number, limit)[stop], value, rel_tol=SLACK):
                return number, 0
            if before <= 0:
                continue
            low = int(first_items(kind, limit - self.hops_s[number])[stop])
            costs = sums[before, low:stop] - kind.time[low:stop] + kind.time[stop] + self.hops_s[number]
            if len(costs) and abs(costs.min() - value) <= SLACK * abs(value):
                return number, low + int(costs.argmin())
        raise AssertionError("a sum without its stages")

    def _numbered(self, backwards: Sequence[tuple[int, int, int]]) -> list[Piece]:
        return [
            Piece(place, self.groupings[kind].degree, kind, first, stop)
            for place, (kind, first, stop) in enumerate(reversed(backwards))
        ]
