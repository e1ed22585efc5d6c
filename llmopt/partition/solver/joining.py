"""Objectives that join the sum of all stages and the largest of them, from answers about either. Exact.

The largest alone: T is bisected over the question whether stages of at most T seconds are possible (parametric search;
Pinar and Aykanat, J. Parallel Distrib. Comput. 64 (2004)). For objectives that join both, the least sum with no stage
above T is a step function that falls as T rises.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from llmopt.partition.problem import SLACK, Objective, Piece

TOLERANCE = 1e-10  # relative; what is left when bisection ends
JOINED = 1e-9  # for those that need a least sum at every step

_NEARLY = 0.02  # relative: with no more than that between them, ends of a bisection are near each other

Pieces = list[Piece]


class Oracle(Protocol):
    """An order of devices, or any of many, that stages can be found for."""

    @property
    def most_stages(self) -> int:
        """How many stages there can be."""
        ...

    def longest_s(self) -> float:
        """What no stage takes more than."""
        ...

    def within(self, seconds: float) -> Pieces | None:
        """Stages of at most so many seconds, or None."""
        ...

    def least_sum(self, limit: float = math.inf) -> tuple[Pieces, float] | None:
        """Stages whose sum is least, none above `limit`, and that sum."""
        ...

    def seconds(self, pieces: Sequence[Piece]) -> list[float]:
        """What each stage takes."""
        ...


def best(oracle: Oracle, objective: Objective, at_most: float = math.inf, tolerance: float = JOINED) -> Pieces | None:
    """The stages that an objective is least for; None where nothing fits, or nothing can be below `at_most`.

    Where it joins the sum and the largest, others may be better by a part of `tolerance`.
    """
    if objective.micro_batches == 1:
        least = oracle.least_sum()
        return least[0] if least is not None else None
    found = smallest_largest(oracle, at_most / objective.micro_batches)
    if found is None:
        return None
    if objective.only_largest(oracle.most_stages):
        return found[0]
    return _joined(oracle, objective, found, at_most, tolerance)


def _joined(
    oracle: Oracle, objective: Objective, tightest: tuple[Pieces, float], at_most: float, tolerance: float
) -> Pieces | None:
    """The best of those between the smallest largest and the least sum."""
    narrow, bottleneck_s = tightest
    loose = oracle.least_sum()
    if loose is None or objective.value(loose[1], bottleneck_s * (1 - 2 * TOLERANCE)) >= at_most:
        return None

    def value(one: Pieces) -> float:
        seconds = oracle.seconds(one)
        return objective.value(sum(seconds), max(seconds))

    ends = [narrow, loose[0]]
    limit = bottleneck_s * (1 + 2 * TOLERANCE)
    join = _rounds if objective.form == "rounds" else _fill
    high = min(at_most, *map(value, ends))
    found = join(oracle, objective, value, limit=limit, total=loose[1], high=high, tolerance=tolerance)
    return min([*ends, *found], key=value)


def smallest_largest(
    oracle: Oracle, at_most: float = math.inf, tolerance: float = TOLERANCE
) -> tuple[Pieces, float] | None:
    """Stages whose largest is smallest, and that; None if nothing fits or it could not be at most `at_most`."""
    most = min(oracle.longest_s(), at_most)
    # From an equal share up: what is far from the answer is not asked about often.
    low, high = 0.0, min(oracle.longest_s() / (4 * oracle.most_stages), most)
    while (pieces := oracle.within(high)) is None:
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    high, reached = min(high, max(oracle.seconds(pieces))), True
    while high - low > tolerance * high:
        middle = _next(low, high, tolerance, reached=reached)
        found = oracle.within(middle)
        if found is None:
            low, reached = middle, False
        else:
            pieces, high, reached = found, min(middle, max(oracle.seconds(found))), not reached
    return pieces, high


def _next(low: float, high: float, tolerance: float, *, reached: bool) -> float:
    """Halfway; or, near the end and `high` being what stages take, just below: if there is nothing, that is the end."""
    if reached and high - low < _NEARLY * high:
        return high * (1 - tolerance / 2)
    return (low + high) / 2


def _rounds(
    oracle: Oracle,
    objective: Objective,
    value: Callable[[Pieces], float],
    *,
    limit: float,
    total: float,
    high: float,
    tolerance: float,
) -> list[Pieces]:
    """max(Σ, m M) ≤ V exactly if the least sum with stages of at most V / m is no more than V: V is bisected.

    `limit` is what the largest is at least and `total` what the sum is, with rounding to spare; `high` is to be beaten.
    """
    count = objective.micro_batches
    found: list[Pieces] = []
    low, middle, reached = max(total, count * limit * (1 - 4 * TOLERANCE)), high, False
    # At first the question is whether there is anything better at all.
    while high - low > tolerance * high:
        least = oracle.least_sum(middle / count)
        if least is None or least[1] > middle * (1 + SLACK):
            low, reached = middle, False
        else:
            found.append(least[0])
            high, reached = min(middle, value(least[0])), not reached
        middle = _next(low, high, tolerance, reached=reached)
    return found


def _fill(
    oracle: Oracle,
    objective: Objective,
    value: Callable[[Pieces], float],
    *,
    limit: float,
    total: float,
    high: float,
    tolerance: float,
) -> list[Pieces]:
    """Intervals of limits are halved; one that cannot hold anything better is dropped.

    What has its largest stage in (low, high] has at least the least sum that `high` allows.
    """
    rest = objective.micro_batches - 1
    found: list[Pieces] = []
    least_value = high
    # No stage is longer than what is to be beaten allows.
    intervals = [(limit, (high - total) / rest, total)]
    while intervals:
        low, high, bound = intervals.pop()
        if bound + rest * low >= least_value * (1 - tolerance):
            continue
        narrow = high - low <= tolerance * high
        middle = low if narrow else (low + high) / 2
        least = oracle.least_sum(middle)
        if least is not None:
            found.append(least[0])
            least_value = min(least_value, value(least[0]))
        if narrow:
            continue
        intervals.append((middle, high, bound))
        if least is not None:
            intervals.append((low, min(middle, max(oracle.seconds(least[0]))), least[1]))
    return found
