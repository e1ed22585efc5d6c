"""Several processes on one job: each takes some of the windows and some of the rows, and what they find goes round.

`torchrun` starts them and tells each, in its environment, how to find the others. A process is called by its rank, the
first by 0: that one alone reads and writes files of the output, and speaks. Alone, a process exchanges nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

from llmopt.errors import LlmoptError

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
Value = TypeVar("Value")
Explain = Callable[[Exception], LlmoptError]

_PLACES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """One process of `size`, here the only one. What is called on one is called on all, in the same order."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def is_first(self) -> bool:
        """Whether this process reads, writes and speaks."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all, in the order of their ranks."""
        return [value]

    def of_first(self, compute: Callable[[], Value]) -> Value:
        """What the first process computes, on all."""
        return compute()

    def add_up(self, tensor: "Tensor") -> None:
        """Replace a tensor by the sum of those of all."""

    def shares(self, count: int) -> list[slice]:
        """So many things divided in their order, as evenly as can be: which of them each process takes."""
        ends = [count * rank // self.size for rank in range(self.size + 1)]
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def spread(self, compute: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
        """What `compute` makes of each item, on all; one process computes it."""
        found = self.gather([compute(item) for item in items[self.rank :: self.size]])
        return [found[index % self.size][index // self.size] for index in range(len(items))]


ALONE = Ranks()


def place() -> tuple[int, int]:
    """The rank of this process and the number of them all, as a launcher such as torchrun has said; else 0 and 1."""
    if any(name not in os.environ for name in _PLACES):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def processes_here() -> int:
    """How many of the processes share this machine."""
    return 1 if place() == (0, 1) else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined(explain: Explain) -> Iterator[Ranks]:
    """The processes that a launcher has started, this one among them; all of them end if one does.

    An error of one process is raised in the others as well, when they next exchange something. From then on the first
    ignores SIGTERM, which torchrun sends to all when a process has failed.

    Args:
        explain: makes an error that people can act on of any other, for the others to show.

    Raises:
        LlmoptError: the processes do not find each other, or another one failed.
    """
    if place() == (0, 1):
        yield ALONE
        return
    from llmopt.pipeline.torch_ranks import connected  # noqa: PLC0415 (late: the command line asks for its `place` first)

    with connected(explain) as ranks:
        yield ranks
