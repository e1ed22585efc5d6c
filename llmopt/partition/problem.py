"""The partition problem as numbers: items in a row, kinds of groups that could take a run of them, one objective.

A stage takes the sum of its items' times and a hop to it from the stage before; its memory is the sum of its items'
and must fit. With Σ the sum over stages and M the largest of them, an objective is

    fill     Σ + (m - 1) M      m micro-batches follow each other through the stages once: a prefill
    rounds   max(Σ, m M)        m micro-batches go round for ever: decoding, and a pipeline kept full
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Sums in another order differ by rounding: what is equal up to this counts as equal.
SLACK = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is minimized, in seconds."""

    form: Literal["fill", "rounds"]
    micro_batches: int = 1

    def value(self, total_s: float, largest_s: float) -> float:
        """Of stages that take `total_s` together and `largest_s` at most."""
        if self.form == "fill":
            return total_s + (self.micro_batches - 1) * largest_s
        return max(total_s, self.micro_batches * largest_s)

    def only_largest(self, stages: int) -> bool:
        """Whether, with at most so many stages, the largest alone decides."""
        return self.form == "rounds" and self.micro_batches >= stages


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kind:
    """A kind of group: sums of times and bytes of the first 0, 1, … items, [items + 1], and the bytes it has.

    A plan of one stage takes `alone_s` and `alone_bytes` less: no token goes back, and a tied table is there once.
    """

    time: Array
    memory: Array
    capacity: float
    alone_s: float = 0.0
    alone_bytes: float = 0.0
    times: list[float] = field(init=False)
    fars: list[int] = field(init=False)
    far: npt.NDArray[np.int64] = field(init=False)
    """From each item, how far memory reaches, [items + 1]."""

    def __post_init__(self) -> None:
        slack = SLACK * max(self.capacity, 1.0)
        far = np.searchsorted(self.memory, self.memory + self.capacity + slack, side="right") - 1
        object.__setattr__(self, "times", self.time.tolist())
        object.__setattr__(self, "far", np.maximum(far, 0) if self.capacity >= 0 else np.zeros_like(far))
        object.__setattr__(self, "fars", self.far.tolist())

    @property
    def items(self) -> int:
        """How many there are."""
        return len(self.time) - 1

    def reach(self, first: int, seconds: float) -> int:
        """How far a stage that begins with item `first` and has so many seconds can go."""
        if seconds < 0:
            return first
        far = self.fars[first]
        return min(bisect_right(self.times, self.times[first] + seconds * (1 + SLACK), first) - 1, far)

    def alone(self) -> float:
        """Seconds of a plan of this one stage; infinite where it does not fit."""
        needed = self.memory[-1] - self.alone_bytes
        fits = needed <= self.capacity * (1 + SLACK)
        return float(self.time[-1] - self.alone_s) if fits else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A place in an order of devices: which kinds of groups could begin there, by degree, and whose node it is in.

    Neighbours with the same `run` are in one node.
    """

    options: tuple[tuple[int, int], ...]  # (degree, index of the kind)
    run: int
    inside_s: float  # a hop within the node
    between_s: float  # a hop from another one


class Piece(NamedTuple):
    """One stage of a solution."""

    slot: int
    degree: int
    kind: int
    first: int
    stop: int


def stage_seconds(pieces: Sequence[Piece], kinds: Sequence[Kind], slots: Sequence[Slot]) -> list[float]:
    """What each stage takes, its hop included; what a plan of one stage saves is not taken off."""
    seconds, run = [], None
    for piece in pieces:
        slot, kind = slots[piece.slot], kinds[piece.kind]
        hop = 0.0 if run is None else slot.inside_s if slot.run == run else slot.between_s
        seconds.append(float(kind.time[piece.stop] - kind.time[piece.first]) + hop)
        run = slot.run
    return seconds
