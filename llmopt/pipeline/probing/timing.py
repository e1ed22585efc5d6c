"""How long something takes, on a CPU or a GPU."""

import time
from collections.abc import Callable
from statistics import median

import torch

SECONDS = 0.15  # for each measurement
LEAST = 5


def median_s(work: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """The median of as many calls as there is time for, so many `times` of it, behind one that is not counted."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    found: list[float] = []
    while len(found) < LEAST or sum(found) < times * SECONDS:
        found.append(once())
    return median(found)
