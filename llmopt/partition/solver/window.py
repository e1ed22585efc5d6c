"""The least value in each of many windows whose ends move one way."""

import numpy as np
import numpy.typing as npt

from llmopt.partition.problem import SLACK, Array, Kind


def window_minimum(values: Array, first: npt.NDArray[np.int64]) -> Array:
    """min of values[..., first[i] : i] for each i, [..., size]; infinite where the window is empty.

    From the minima over the powers of two: every window is two of those that overlap.
    """
    size = values.shape[-1]
    widths = np.arange(size) - first
    best = np.full(values.shape, np.inf)
    level, width = values, 1
    while width < size:
        places = np.flatnonzero((widths >= width) & (widths < 2 * width))
        if len(places):
            best[..., places] = np.minimum(level[..., first[places]], level[..., places - width])
        if 2 * width < size:
            level = np.minimum(level[..., :-width], level[..., width:])
        width *= 2
    return best


def first_items(kind: Kind, seconds: float) -> npt.NDArray[np.int64]:
    """The first item with which a stage may begin that ends before each item, [items + 1]; its own where none may."""
    places = np.arange(kind.items + 1)
    if seconds < 0:
        return places
    if np.isfinite(seconds):
        in_time = np.searchsorted(kind.time + seconds * (1 + SLACK) + SLACK * kind.time[-1], kind.time, side="left")
    else:
        in_time = np.zeros_like(places)
    in_memory = np.searchsorted(kind.far, places, side="left")
    return np.minimum(np.maximum(in_time, in_memory), places)
