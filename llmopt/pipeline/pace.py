"""How the time that somebody gives for quantizing is divided among the blocks, which come one after another.

What every block needs is done whatever it takes. Of what is left, as many blocks get GPTQ as there is time for, at the
pace that was measured so far, and where all get it, as many learn as a whole; they are spread evenly over the model.
With time without end, which is the default, all get everything, and no clock decides anything.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from llmopt.model.spec import Block
from llmopt.quantize.gptq import Gptq
from llmopt.quantize.reconstruct import RECONSTRUCT
from llmopt.report.results import LayerResult

# Why a layer has less than there is, as reports say it.
NO_TIME_TO_FIT, NO_TIME_TO_LEARN = f"no time for {Gptq.name}", "no time for its block to learn"
MARGIN = 1.1  # on what a step took so far: machines are not even
# What learning is taken to cost before it was measured, as a multiple of all else that is done with a block.
LEARNING = 8.0
ALMOST_ONE = 1 - 1e-9  # of a turn, for shares add up inexactly


class Pace:
    """The clock of one run, which starts when this is made."""

    def __init__(self, minutes: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.minutes = minutes
        self.clock = clock
        self.started = clock()
        self.ends = self.started + (math.inf if minutes is None else 60 * minutes)
        self.took_s = 0.0  # until everything was quantized
        self._first = self.started  # when the first block was begun
        self._begun = 0  # blocks
        self._seconds: dict[str, list[float]] = {Gptq.name: [], RECONSTRUCT: []}  # of each block that had that step
        # Who is next: a block that has collected a whole turn. The first is given one, so that its pace is known soon.
        self._turns = {Gptq.name: 1.0, RECONSTRUCT: 1.0}

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Measure a piece of a step, of the block at hand."""
        before = self.clock()
        yield
        if self._begun and step in self._seconds:
            self._seconds[step][-1] += self.clock() - before

    def begin(self, left: float, size: float = 1.0) -> bool:
        """Begin a block, or the head: whether it gets GPTQ. Its size and what is left with it are in blocks."""
        base = self._base()
        if not self._begun:
            self._first = self.clock()
        self._begun += 1
        spare = self.ends - self.clock() - left * base
        return self._has_turn(Gptq.name, spare, left / size, size * self._mean(Gptq.name))

    def learns(self, blocks: int, head: float) -> bool:
        """Whether the block at hand learns as a whole; so many are left with it, and the head is as much as so many."""
        base, fitting = self._base(), self._mean(Gptq.name)
        spare = self.ends - self.clock() - (blocks - 1 + head) * (base + MARGIN * fitting)
        return self._has_turn(RECONSTRUCT, spare, blocks, self._mean(RECONSTRUCT) or LEARNING * (base + fitting))

    def finish(self) -> None:
        """Everything is quantized."""
        self.took_s = self.clock() - self.started

    def _base(self) -> float:
        """What a block takes beside the two steps, in seconds."""
        if not self._begun:
            return 0.0
        return (self.clock() - self._first - sum(map(sum, self._seconds.values()))) / self._begun

    def _mean(self, step: str) -> float:
        found = self._seconds[step]
        return sum(found) / len(found) if found else 0.0

    def _has_turn(self, step: str, spare: float, candidates: float, seconds: float) -> bool:
        """Give one of so many candidates its share of the turns that fit into the spare time, and see whether it has a
        whole one by now.
        """
        cost = MARGIN * seconds
        self._turns[step] += min(1.0, max(0.0, spare / (candidates * cost))) if cost else 1.0
        if self._turns[step] < ALMOST_ONE or spare < cost or spare <= 0:
            return False
        self._turns[step] -= 1
        self._seconds[step].append(0.0)
        return True


def time_notes(pace: Pace, blocks: Sequence[Block], layers: Iterable[LayerResult]) -> list[str]:
    """What became of the model within the time that was given, and whether it was enough; nothing if none was."""
    if pace.minutes is None:
        return []
    reasons = {layer.name: layer.reason or "" for layer in layers}

    def lacking(reason: str) -> int:
        return sum(any(reason in reasons[linear.name] for linear in block.linears()) for block in blocks)

    fitted = len(blocks) - lacking(NO_TIME_TO_FIT)
    done = (
        f"in {pace.minutes:g} minutes there was time for {Gptq.name} in {fitted} of {len(blocks)} blocks, and for "
        f"{fitted - lacking(NO_TIME_TO_LEARN)} to learn as a whole: another run, in which time decides anew, may differ"
    )
    over = f"quantizing took {pace.took_s / 60:.2f} minutes, more than the {pace.minutes:g} that were given"
    return [done, over] if pace.took_s > 60 * pace.minutes else [done]
