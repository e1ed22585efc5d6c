"""What a rank spent its time on, and what it sent."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Spent:
    """One phase of one round: a prefill, or the decoding of one token of every sequence. Seconds, and bytes sent.

    `busy_s` is all that the stage computes and adds up with its peers, of which `adding_s` is the latter. `waiting_s`
    is spent on other stages.
    """

    busy_s: float = 0.0
    adding_s: float = 0.0
    waiting_s: float = 0.0
    sent_bytes: int = 0
    added_bytes: int = 0


def _nothing() -> None:
    """A CPU is done when it returns."""


@dataclass(slots=True)
class Trace:
    """The phases of a run, the last one being that which is going on."""

    phases: list[Spent] = field(default_factory=lambda: [Spent()])
    steps: int = 0
    settle: Callable[[], object] = _nothing  # until a device has done what it was told
    waiting: str = ""  # for what; empty while the rank computes. An error leaves it: that is what was waited for

    @property
    def now(self) -> Spent:
        """The phase that is going on."""
        return self.phases[-1]

    def begin(self) -> None:
        """The next phase begins."""
        self.phases.append(Spent())

    def advance(self) -> None:
        """Something is done: who watches sees that the rank is alive."""
        self.steps += 1

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Computing."""
        start = time.perf_counter()
        yield
        self.settle()
        self.now.busy_s += time.perf_counter() - start
        self.advance()

    @contextmanager
    def wait_for(self, what: str) -> Iterator[None]:
        """Waiting for another stage."""
        start, self.waiting = time.perf_counter(), what
        yield
        self.now.waiting_s += time.perf_counter() - start
        self.waiting = ""
        self.advance()

    @contextmanager
    def adding(self, size_bytes: int) -> Iterator[None]:
        """Adding up with the peers, which is part of computing."""
        start, self.waiting = time.perf_counter(), "the ranks of its stage"
        yield
        self.now.adding_s += time.perf_counter() - start
        self.now.added_bytes += size_bytes
        self.waiting = ""
        self.advance()
