"""Stages for devices in a given order, any of which may be left out. Exact."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmopt.partition.problem import Kind, Piece, Slot, stage_seconds
from llmopt.partition.solver.reaching import Reaching
from llmopt.partition.solver.summing import Summing


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
        return Reaching(self.kinds, self.slots, seconds).stages()

    def least_sum(self, limit: float = math.inf) -> tuple[list[Piece], float] | None:
        """Stages whose sum is least, none above `limit`, and that sum."""
        return Summing(self.kinds, self.slots, limit).stages()
