"""How long messages between ranks take: what the first byte costs, and what each one after it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

SMALL_BYTES, LARGE_BYTES = 1 << 12, 1 << 22
_REPEATS = 30
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

        return _median_s(once) / 2

    return _link(there_and_back)


def measure_sums(device: torch.device) -> Link:
    """Adding up over all ranks, as a function of the bytes that each one has. Call it on all ranks."""

    def add_up(size_bytes: int) -> float:
        values = torch.zeros(size_bytes // _FLOAT_BYTES, device=device)
        return _median_s(lambda: dist.all_reduce(values))

    return _link(add_up)


def _link(seconds: Callable[[int], float]) -> Link:
    small_s, large_s = seconds(SMALL_BYTES), seconds(LARGE_BYTES)
    byte_s = max(large_s - small_s, 1e-12) / (LARGE_BYTES - SMALL_BYTES)
    return Link(latency_s=max(small_s - SMALL_BYTES * byte_s, 0.0), bytes_per_s=1 / byte_s)


def _median_s(once: Callable[[], None]) -> float:
    dist.barrier()
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        once()
        found.append(time.perf_counter() - start)
    return median(found[_REPEATS // 3 :])
