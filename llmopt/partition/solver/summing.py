"""Least sums of the stages of devices in a given order: f[i] for the first i items, device by device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from llmopt.partition.problem import SLACK, Array, Kind, Piece, Slot
from llmopt.partition.solver.window import first_items, window_minimum

# Up to so many items a table of all pairs is quicker than minima over windows.
_FEW_ITEMS = 400


class Summing:
    """Least sums of the first items: with the devices before a slot, and if the last of them is in its node."""

    def __init__(self, kinds: Sequence[Kind], slots: Sequence[Slot], limit: float) -> None:
        self._kinds, self._slots, self._limit = kinds, slots, limit
        size, count = kinds[0].items + 1, len(slots) + 1
        self._anywhere, self._here = np.full((count, size), np.inf), np.full((count, size), np.inf)
        self._nothing = np.full(size, np.inf)
        self._nothing[0] = 0.0
        self._steps: dict[tuple[int, float], _Step] = {}
        self._begun: dict[int, Array] = {}

    def stages(self) -> tuple[list[Piece], float] | None:
        """The stages, and their sum; None where nothing fits."""
        anywhere, here = self._anywhere, self._here
        for place, slot in enumerate(self._slots):
            np.minimum(anywhere[place + 1], anywhere[place], out=anywhere[place + 1])
            if self._same_run(place):
                np.minimum(here[place + 1], here[place], out=here[place + 1])
            for degree, number in slot.options:
                best = self._first(number)
                for sums, hop_s in self._sources(place):
                    best = np.minimum(best, self._step(number, hop_s).after(sums))
                np.minimum(anywhere[place + degree], best, out=anywhere[place + degree])
                np.minimum(here[place + degree], best, out=here[place + degree])
        total = float(anywhere[-1][-1])
        return (self._trace(), total) if math.isfinite(total) else None

    def _same_run(self, place: int) -> bool:
        return place > 0 and self._slots[place].run == self._slots[place - 1].run

    def _first(self, number: int) -> Array:
        if number not in self._begun:
            self._begun[number] = self._step(number, 0.0).after(self._nothing)
        return self._begun[number]

    def _step(self, number: int, hop_s: float) -> "_Step":
        key = (number, hop_s)
        if key not in self._steps:
            self._steps[key] = _Step(kind=self._kinds[number], hop_s=hop_s, limit=self._limit)
        return self._steps[key]

    def _sources(self, place: int) -> list[tuple[Array, float]]:
        slot = self._slots[place]
        sources = [(self._anywhere[place], slot.between_s)] if place else []
        return [*sources, (self._here[place], slot.inside_s)] if self._same_run(place) else sources

    def _trace(self) -> list[Piece]:
        pieces: list[Piece] = []
        place, stop, table = len(self._slots), self._kinds[0].items, self._anywhere
        while stop > 0:
            value = float(table[place][stop])
            skippable = table is self._anywhere or self._same_run(place - 1)
            if skippable and table[place - 1][stop] == value:
                place -= 1
                continue
            piece, table = self._last(place, stop, value)
            pieces.append(piece)
            place, stop = piece.slot, piece.first
        return pieces[::-1]

    def _last(self, place: int, stop: int, value: float) -> tuple[Piece, Array]:
        """The stage that ends at a slot and an item, and the table that its beginning is from."""
        for begin in range(place - 1, -1, -1):
            for degree, number in self._slots[begin].options:
                if begin + degree != place:
                    continue
                sources = [(self._nothing, 0.0), *self._sources(begin)]
                for index, (sums, hop_s) in enumerate(sources):
                    first = self._step(number, hop_s).begin(sums, stop, value)
                    if first is not None:
                        table = self._here if index == 2 else self._anywhere
                        return Piece(begin, degree, number, first, stop), table
        raise AssertionError("a sum without its stages")


@dataclass(slots=True, kw_only=True, eq=False)
class _Step:
    """One more stage of some kind behind a hop: from the least sums without it to those with it, both [items + 1]."""

    kind: Kind
    hop_s: float
    limit: float
    first: npt.NDArray[np.int64] = field(init=False)
    pairs: Array | None = field(init=False)

    def __post_init__(self) -> None:
        self.first = first_items(self.kind, self.limit - self.hop_s)
        size = len(self.first)
        self.pairs = None
        if size <= _FEW_ITEMS:
            begin, end = np.arange(size)[None, :], np.arange(size)[:, None]
            allowed = (begin >= self.first[:, None]) & (begin < end)
            self.pairs = np.where(allowed, self.kind.time[:, None] - self.kind.time[None, :] + self.hop_s, np.inf)

    def after(self, sums: Array) -> Array:
        if self.pairs is not None:
            extended: Array = (self.pairs + sums).min(axis=1)
            return extended
        return window_minimum(sums - self.kind.time, self.first) + self.kind.time + self.hop_s

    def begin(self, sums: Array, stop: int, value: float) -> int | None:
        """Where the stage begins that ends before `stop` with that value; None if none does."""
        low = int(self.first[stop])
        if low >= stop:
            return None
        if self.pairs is not None:
            costs = self.pairs[stop, low:stop] + sums[low:stop]
        else:
            costs = sums[low:stop] - self.kind.time[low:stop] + self.kind.time[stop] + self.hop_s
        place = int(np.argmin(costs))
        return low + place if abs(costs[place] - value) <= SLACK * abs(value) else None
