"""How far devices in a given order get with stages of at most so many seconds.

Whoever gets further can also get less far, so one number a device, and one for the last stage being in its node,
suffice.
"""

from collections.abc import Sequence

import numpy as np

from llmopt.partition.problem import SLACK, Kind, Piece, Slot


class Reaching:
    """How far devices get: with those before a slot (`anywhere`), and if the last of them is in its node (`here`)."""

    def __init__(self, kinds: Sequence[Kind], slots: Sequence[Slot], seconds: float) -> None:
        self._kinds, self._slots, self._seconds = kinds, slots, seconds
        count = len(slots) + 1
        self._anywhere, self._here = [0] * count, [0] * count
        self._from_any: list[Piece | None] = [None] * count
        self._from_here: list[Piece | None] = [None] * count
        self._starts = [kind.reach(0, seconds) for kind in kinds]
        self._footholds: dict[tuple[int, float], list[int]] = {}

    def stages(self) -> list[Piece] | None:
        """Stages that get to the end, or None."""
        anywhere, here, items, run = self._anywhere, self._here, self._kinds[0].items, None
        for place, slot in enumerate(self._slots):
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
        slot, kind, after = self._slots[place], self._kinds[number], place + degree
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
            kind, places = self._kinds[number], np.arange(len(self._kinds[number].time))
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
        return place > 0 and self._slots[place].run == self._slots[place - 1].run
