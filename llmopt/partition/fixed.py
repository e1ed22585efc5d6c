"""Stages for devices in a given order, any of which may be left out. Exact.

How far the first devices get with stages of at most T seconds: whoever gets further can also get less far, so one
number a device, and one for the last stage being in its node, suffice. The least sum: f[i] for the first i items,
device by device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from llmopt.partition.problem import SLACK, Array, Kind, Piece, Slot, stage_seconds
from llmopt.partition.window import first_items, window_minimum

# Up to so many items a table of all pairs is quicker than minima over windows.
_FEW_ITEMS = 400


@dataclass(slots=True, kw_only=True, eq=False)
class FixedOrder:
    """One order of devices. A hop to a slot comes from its own node or from another one."""

    kinds: Sequence[Kind]
    slots: Sequence[Slot]

    @property
    def most_stages(self) -> int:
        """A stage has a device and an item at least."""
        return min(len(self.slots), self.kinds[0].items)

    def longest_s(self) -> float:
        """Everything on the slowest, and the longest hop."""
        hop_s = max(max(slot.inside_s, slot.between_s) for slot in self.slots)
        return max(float(kind.time[-1]) for kind in self.kinds) + hop_s

    def seconds(self, pieces: Sequence[Piece]) -> list[float]:
        """What each stage takes."""
        return stage_seconds(pieces, self.kinds, self.slots)

    def alone(self) -> Piece | None:
        """The quickest of the plans of one stage that fit."""
        items = self.kinds[0].items
        pieces = [
            Piece(place, degree, kind, 0, items)
            for place, slot in enumerate(self.slots)
            for degree, kind in slot.options
            if math.isfinite(self.kinds[kind].alone())
        ]
        return min(pieces, key=lambda piece: self.kinds[piece.kind].alone(), default=None)

    def within(self, seconds: float) -> list[Piece] | None:
        """Stages of at most so many seconds, or None."""
        return _Reaching(self, seconds).stages()

    def least_sum(self, limit: float = math.inf) -> tuple[list[Piece], float] | None:
        """Stages whose sum is least, none above `limit`, and that sum."""
        return _Summing(self, limit).stages()


class _Reaching:
    """How far devices get: with those before a slot (`anywhere`), and if the last of them is in its node (`here`)."""

    def __init__(self, order: FixedOrder, seconds: float) -> None:
        self._order, self._seconds = order, seconds
        count = len(order.slots) + 1
        self._anywhere, self._here = [0] * count, [0] * count
        self._from_any: list[Piece | None] = [None] * count
        self._from_here: list[Piece | None] = [None] * count
        self._starts = [kind.reach(0, seconds) for kind in order.kinds]
        self._footholds: dict[tuple[int, float], list[int]] = {}

    def stages(self) -> list[Piece] | None:
        anywhere, here, items, run = self._anywhere, self._here, self._order.kinds[0].items, None
        for place, slot in enumerate(self._order.slots):
            near = here[place] if slot.run == run else 0
            run = slot.run
            if anywhere[place] > anywhere[place + 1]:
                anywhere[place + 1], self._from_any[place + 1] = anywhere[place], self._from_any[place]
            if near > here[place + 1]:
                here[place + 1], self._from_here[place + 1] = near, self._from_here[place]
            for degree, number in slot.options:
                self._use(place, degree, number, near)
            if anywhere[place + 1] == items:
                return self._trace(place + 1)
        return None

    def _use(self, place: int, degree: int, number: int, near: int) -> None:
        slot, kind, after = self._order.slots[place], self._order.kinds[number], place + degree
        reached, first = self._starts[number], 0
        if near:
            further = kind.reach(near, self._seconds - slot.inside_s)
            if further > reached:
                reached, first = further, near
        far = self._anywhere[place]
        if far and (far > near or slot.between_s < slot.inside_s):
            further, begin = kind.reach(far, self._seconds - slot.between_s), far
            if further <= far and slot.inside_s < slot.between_s:
                # Nothing more, but taking over the last items puts a stage into this node.
                further = self._foothold(number, slot.between_s)[far]
                begin = further - 1
            if further > reached:
                reached, first = further, begin
        if reached <= first:
            return
        piece = Piece(place, degree, number, first, reached)
        if reached > self._here[after]:
            self._here[after], self._from_here[after] = reached, piece
        if reached > self._anywhere[after]:
            self._anywhere[after], self._from_any[after] = reached, piece

    def _foothold(self, number: int, hop_s: float) -> list[int]:
        """For each item, the end of the last stage of one item that is possible and ends there or before."""
        key = (number, hop_s)
        if key not in self._footholds:
            kind, places = self._order.kinds[number], np.arange(len(self._order.kinds[number].time))
            in_time = np.diff(kind.time) <= (self._seconds - hop_s) * (1 + SLACK)
            possible = np.concatenate([[False], in_time & (kind.far[:-1] > places[:-1])])
            self._footholds[key] = np.maximum.accumulate(np.where(possible, places, 0)).tolist()
        return self._footholds[key]

    def _trace(self, place: int) -> list[Piece]:
        """Back from the last stage: the one before ends where this begins, and is in the same node if it was."""
        pieces: list[Piece] = []
        piece = self._from_any[place]
        while piece is not None:
            stop = pieces[-1].first if pieces else piece.stop
            if piece.first < stop:  # else all of it was taken over
                pieces.append(Piece(piece.slot, piece.degree, piece.kind, piece.first, stop))
            near = self._from_here[piece.slot] if self._same_run(piece.slot) else None
            before = near if near is not None and near.stop == piece.first else self._from_any[piece.slot]
            piece = before if piece.first else None
        return pieces[::-1]

    def _same_run(self, place: int) -> bool:
        return place > 0 and self._order.slots[place].run == self._order.slots[place - 1].run


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


class _Summing:
    """Least sums of the first items: with the devices before a slot, and if the last of them is in its node."""

    def __init__(self, order: FixedOrder, limit: float) -> None:
        self._order, self._limit = order, limit
        size, count = order.kinds[0].items + 1, len(order.slots) + 1
        self._anywhere, self._here = np.full((count, size), np.inf), np.full((count, size), np.inf)
        self._nothing = np.full(size, np.inf)
        self._nothing[0] = 0.0
        self._steps: dict[tuple[int, float], _Step] = {}
        self._begun: dict[int, Array] = {}

    def stages(self) -> tuple[list[Piece], float] | None:
        anywhere, here = self._anywhere, self._here
        for place, slot in enumerate(self._order.slots):
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
        return place > 0 and self._order.slots[place].run == self._order.slots[place - 1].run

    def _first(self, number: int) -> Array:
        if number not in self._begun:
            self._begun[number] = self._step(number, 0.0).after(self._nothing)
        return self._begun[number]

    def _step(self, number: int, hop_s: float) -> _Step:
        key = (number, hop_s)
        if key not in self._steps:
            self._steps[key] = _Step(kind=self._order.kinds[number], hop_s=hop_s, limit=self._limit)
        return self._steps[key]

    def _sources(self, place: int) -> list[tuple[Array, float]]:
        slot = self._order.slots[place]
        sources = [(self._anywhere[place], slot.between_s)] if place else []
        return [*sources, (self._here[place], slot.inside_s)] if self._same_run(place) else sources

    def _trace(self) -> list[Piece]:
        pieces: list[Piece] = []
        place, stop, table = len(self._order.slots), self._order.kinds[0].items, self._anywhere
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
            for degree, number in self._order.slots[begin].options:
                if begin + degree != place:
                    continue
                sources = [(self._nothing, 0.0), *self._sources(begin)]
                for index, (sums, hop_s) in enumerate(sources):
                    first = self._step(number, hop_s).begin(sums, stop, value)
                    if first is not None:
                        table = self._here if index == 2 else self._anywhere
                        return Piece(begin, degree, number, first, stop), table
        raise AssertionError("a sum without its stages")
