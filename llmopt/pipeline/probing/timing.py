"""How long something takes, on a CPU or a GPU.

Whoever else uses a machine slows it for some seconds at a time. So each thing is measured a little in each of several
sweeps through all of them, and the median of the sweeps counts.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from statistics import median
from typing import TypeVar

import torch

BEYOND_CACHES_BYTES = 96 << 20
SWEEPS = 5
SECONDS = 0.03  # for each measurement in a sweep
LEAST = 2

_Case = TypeVar("_Case", bound=Hashable)


def medians(sweeps: Iterable[Mapping[_Case, float]]) -> dict[_Case, float]:
    """Of what was measured in all sweeps."""
    found = list(sweeps)
    return {case: median(sweep[case] for sweep in found) for case in found[0]}


def median_s(work: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """The median of as many calls as there is time for, so many `times` of it, behind one that is not counted."""

    once_s(work, device)
    found: list[float] = []
    while len(found) < LEAST or sum(found) < times * SECONDS:
        found.append(once_s(work, device))
    return median(found)


def once_s(work: Callable[[], object], device: torch.device) -> float:
    """One call."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
