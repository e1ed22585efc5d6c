"""Ranks as threads of the test: what several processes do together, without starting any."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from llmopt.pipeline.ranks import Ranks

Value = TypeVar("Value")


class ThreadRanks(Ranks):
    """One of several threads, which meet to exchange."""

    def __init__(self, rank: int, barrier: threading.Barrier, table: list[object]) -> None:
        super().__init__(rank, len(table))
        self.barrier = barrier
        self.table = table

    def gather(self, value: Value) -> list[Value]:
        self.table[self.rank] = value
        self.barrier.wait()
        found = list(self.table)
        self.barrier.wait()
        return found  # type: ignore[return-value]

    def of_first(self, compute: Callable[[], Value]) -> Value:
        return self.gather(compute() if self.is_first else None)[0]  # type: ignore[return-value]

    def add_up(self, tensor: Tensor) -> None:
        parts = self.gather(tensor.clone())
        tensor.copy_(sum(parts[1:], parts[0]))


def together(size: int, work: Callable[[Ranks], Value]) -> list[Value]:
    """What `work` gives to each of so many ranks; if one fails, so do all, and its error is raised."""
    barrier, table = threading.Barrier(size, timeout=60), [None] * size

    def alone(rank: int) -> Value:
        try:
            return work(ThreadRanks(rank, barrier, table))  # type: ignore[arg-type]
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(alone, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
