"""What no stages are below, where there are too many devices to count them all: each class of devices has a price.

If stages pay for the devices they take, and what all devices would pay is given back, nothing that keeps to the devices
there are pays more than before (Lagrangian relaxation, Geoffrion 1974). With prices, how many devices are left does not
matter, so the least sum is a shortest path over the items. Prices rise for what too many stages want.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from llmopt.partition.problem import SLACK, Array, Objective
from llmopt.partition.solver.classes import AnyOrder

MOST_ITEMS = 400
_MOST_CHANGES = 25  # of prices
_HALVINGS = 8
_DOUBLINGS = 6
_NARROW = 0.01  # relative: limits of stages that are nearer to each other are not told apart
_PUSH = 1.3  # beyond what would reach the target if costs went on as they do


@dataclass(kw_only=True, eq=False)
class Prices:
    """Classes of devices, their hops no longer than they are."""

    problem: AnyOrder
    changes: int = _MOST_CHANGES
    _prices: Array = field(init=False)

    def __post_init__(self) -> None:
        self._prices = np.zeros(len(self.problem.counts))

    def raised(self, objective: Objective, low: float, high: float) -> float:
        """Something that nothing is below, from `low` on, which is one, up to `high`."""
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.are_above(objective, middle) else (low, middle)
        return low

    def from_below(self, objective: Objective, low: float) -> float:
        """The same without a value to stay below."""
        high = 2 * low
        for _ in range(_DOUBLINGS):
            if not self.are_above(objective, high):
                break
            low, high = high, 2 * high
        return self.raised(objective, low, high)

    def are_above(self, objective: Objective, value: float) -> bool:
        """Whether it is proven that no stages are worth as little."""
        count = objective.micro_batches
        if objective.form == "rounds" or count == 1:
            return self._sum_is_above(value / count if count > 1 else value, value)
        return self._fill_is_above(count - 1, 0.0, value / count, value)

    def _fill_is_above(self, rest: int, low: float, high: float, value: float) -> bool:
        """For stages of which the largest is between two limits."""
        if self._sum_is_above(high, value - rest * low):
            return True
        if high - low <= _NARROW * high:
            return False
        middle = (low + high) / 2
        return self._fill_is_above(rest, middle, high, value) and self._fill_is_above(rest, low, middle, value)

    def _sum_is_above(self, limit: float, value: float) -> bool:
        """Whether it is proven that the least sum of stages, none above a limit, is above a value."""
        costs = np.where(self._costs <= limit * (1 + SLACK), self._costs, np.inf)
        counts = np.array(self.problem.counts, dtype=float)
        places = np.array([one.place for one in self.problem.groupings])
        units = np.array([one.units for one in self.problem.groupings], dtype=float)
        prices = self._prices
        for _ in range(self.changes):
            priced = costs + (prices[places] * units)[:, None, None]
            total, stages = _shortest_path(priced.min(axis=0))
            bound = total - float(prices @ counts)
            if bound > value:
                self._prices = prices
                return True
            used = np.zeros_like(counts)
            for first, stop in stages:
                kind = int(priced[:, first, stop].argmin())
                used[places[kind]] += units[kind]
            wanting = np.where((prices == 0) & (used < counts), 0.0, used - counts)
            if not wanting.any():
                return False  # no prices give more
            prices = np.maximum(prices + _PUSH * (value - bound + SLACK) / float(wanting @ wanting) * wanting, 0.0)
        return False

    @cached_property
    def _costs(self) -> Array:
        """Of a stage of each kind from one item to another, [kinds, items + 1, items + 1]; else infinite."""
        places = np.arange(self.problem.kinds[0].items + 1)
        return np.array(
            [
                np.where(
                    (places[None] > places[:, None]) & (places[None] <= kind.far[:, None]),
                    kind.time[None] - kind.time[:, None] + np.where(places > 0, hop_s, 0.0)[:, None],
                    np.inf,
                )
                for kind, hop_s in zip(self.problem.kinds, self.problem.hops_s, strict=True)
            ]
        )


def _shortest_path(costs: Array) -> tuple[float, list[tuple[int, int]]]:
    """From the first item to behind the last: what it costs, and its edges; none where there is no path."""
    size = len(costs)
    least, came = np.zeros(size), np.zeros(size, dtype=np.int64)
    for stop in range(1, size):
        through = least[:stop] + costs[:stop, stop]
        came[stop] = through.argmin()
        least[stop] = through[came[stop]]
    edges, stop = [], size - 1
    while stop and np.isfinite(least[-1]):
        edges.append((int(came[stop]), stop))
        stop = int(came[stop])
    return float(least[-1]), edges
