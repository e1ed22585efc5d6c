"""How long messages between ranks take: what the first byte costs, and what each one after it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

SMALL_BYTES, LARGE_BYTES = 1 << 12, 1 << 22
_SECONDS, _LEAST, _MOST = 1.0, 5, 200  # for each size
_TURNS = 25
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A message of n bytes takes latency + n / bandwidth."""

    latency_s: float
    bytes_per_s: float


def measure_messages(rank: int, device: torch.device) -> Link:
    """From rank 0 to rank 1 and back, half of it; the others wait. Call it on all ranks, and read it on rank 0."""

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

    return _link(there_and_back)


def measure_sums(device: torch.device) -> Link:
    """Adding up over all ranks, as a function of the bytes that each one has. Call it on all ranks."""

    def add_up(size_bytes: int) -> float:
        values = torch.zeros(size_bytes // _FLOAT_BYTES, device=device)
        return _mean_s(lambda: dist.all_reduce(values), device)

    return _link(add_up)


def in_turns(work: Callable[[], object], rank: int, device: torch.device) -> float:
    """Ranks 0 and 1 work in turns, each when the other is done; how long the work takes then. Call it on all ranks."""
    word = torch.zeros(1, device=device)
    spent_s: list[float] = []
    dist.barrier()
    for _ in range(_TURNS if rank < 2 else 0):
        if rank == 1:
            dist.recv(word, 0)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent_s.append(time.perf_counter() - start)
        dist.send(word, 1 - rank)
        if rank == 0:
            dist.recv(word, 1)
    dist.barrier()
    return median(spent_s) if spent_s else 0.0


def _link(seconds: Callable[[int], float]) -> Link:
    small_s, large_s = seconds(SMALL_BYTES), seconds(LARGE_BYTES)
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
