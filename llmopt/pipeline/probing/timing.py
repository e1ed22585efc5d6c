"""How long something takes, on a CPU or a GPU."""

import time
from collections.abc import Callable

import torch

SECONDS = 0.12  # for each measurement
LEAST = 3


def mean_s(work: Callable[[], object], device: torch.device) -> float:
    """The mean of as many calls as there is time for, behind one that is not counted.

    A run has all of its calls, the slow ones too: a median would be quicker than what comes of them.
    """

    def once() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    once()
    count, start = 0, time.perf_counter()
    while count < LEAST or time.perf_counter() - start < SECONDS:
        once()
        count += 1
    return (time.perf_counter() - start) / count
