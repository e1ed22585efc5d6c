"""How long messages between ranks take: what the first byte costs, and what each one after it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, median

import torch
import torch.distributed as dist

from llmopt.partition.runtime.sums import Sums
from llmopt.pipeline.probing.timing import once_s

SMALL_BYTES, LARGE_BYTES = 1 << 12, 1 << 22
_SECONDS, _LEAST, _MOST = 0.3, 5, 200  # for each size in a sweep
_TURNS = 25
_SUMS = 60
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A message of n bytes takes latency + n / bandwidth."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Of ranks that sleep between their turns: what it takes longer to begin, and a message, from sending to waking."""

    waking_s: float
    message_s: float


def message_seconds(rank: int, device: torch.device) -> dict[int, float]:
    """By bytes: from rank 0 to rank 1 and back, half of it; the others wait. Call it on all ranks; rank 0 knows."""

    def there_and_back(size_bytes: int) -> float:
        values = torch.zeros(size_bytes // _FLOAT_BYTES, device=device)

        def once() -> None:
            if rank == 0:
                dist.send(values, 1)
                dist.recv(values, 1)
            elif rank == 1:
                dist.recv(values, 0)
                dist.send(values, 0)

        return _mean_s(once, device) / 2

    return {size: there_and_back(size) for size in (SMALL_BYTES, LARGE_BYTES)}


def sum_seconds(sums: Sums, work: Callable[[], object], device: torch.device) -> dict[int, float]:
    """Adding up over all ranks, by the bytes that each one has. Call it on all ranks.

    Each sum is behind some work, as it is in a block: ranks that come at the same moment are quicker, and never do.
    """

    def add_up(size_bytes: int) -> float:
        values = torch.zeros(size_bytes // _FLOAT_BYTES, device=device)
        spent_s: list[float] = []
        for _ in range(_SUMS):
            once_s(work, device)
            spent_s.append(once_s(lambda: sums.add_up(values), device))
        return fmean(spent_s)

    return {size: add_up(size) for size in (SMALL_BYTES, LARGE_BYTES)}


def in_turns(steps: Callable[[], list[float]], rank: int, device: torch.device) -> Turns:
    """Ranks 0 and 1 work in turns, and each sleeps until the other is done. Call it on all ranks.

    `steps` says what each of several steps took that are alike; by the last of them a rank is taken to be awake.
    """
    # When it was sent; clocks of processes on one machine are the same.
    stamp = torch.zeros(1, dtype=torch.float64, device=device)
    turns: list[list[float]] = []
    under_way_s: list[float] = []

    def receive() -> None:
        dist.recv(stamp, 1 - rank)
        under_way_s.append(time.perf_counter() - float(stamp))

    dist.barrier()
    for _ in range(_TURNS if rank < 2 else 0):
        if rank == 1:
            receive()
        turns.append(steps())
        dist.send(stamp.fill_(time.perf_counter()), 1 - rank)
        if rank == 0:
            receive()
    dist.barrier()
    if not turns:
        return Turns(waking_s=0.0, message_s=0.0)
    *early, last = (median(step) for step in zip(*turns, strict=True))
    return Turns(waking_s=sum(early) - len(early) * last, message_s=fmean(under_way_s))


def line(seconds: Mapping[int, float]) -> Link:
    """The line through two sizes."""
    small_s, large_s = seconds[SMALL_BYTES], seconds[LARGE_BYTES]
    byte_s = max(large_s - small_s, 1e-12) / (LARGE_BYTES - SMALL_BYTES)
    return Link(latency_s=max(small_s - SMALL_BYTES * byte_s, 0.0), bytes_per_s=1 / byte_s)


def _mean_s(once: Callable[[], None], device: torch.device) -> float:
    """The mean of as many calls as rank 0 says that there is time for.

    Not the median: who waits for another process waits long at times, and a run adds up all of it.
    """
    dist.barrier()
    once()
    start = time.perf_counter()
    once()
    count = torch.tensor([min(max(_LEAST, int(_SECONDS / (time.perf_counter() - start))), _MOST)], device=device)
    dist.broadcast(count, 0)
    start = time.perf_counter()
    for _ in range(int(count)):
        once()
    return (time.perf_counter() - start) / int(count)
