"""Calls against one another, in turns: what slows the machine for a while slows all of them."""

import math
import time
from collections.abc import Callable, Sequence

Call = Callable[[], object]
Clock = Callable[[], float]

TURN_S = 2e-3  # what a turn of a call takes at least, so that the clock's own time counts for nothing
MOST_ROUNDS, FEWEST_ROUNDS = 6, 2


def fastest_ms(calls: Sequence[Call], budget_s: float, clock: Clock = time.perf_counter) -> list[float]:
    """The least time of each call, in milliseconds: other programs can only make it longer.

    Each has at least `FEWEST_ROUNDS` turns, the first of which warms it up, and no round begins once the budget is
    spent.
    """
    start = clock()
    best = [_seconds(call, 1, clock) for call in calls]
    for done in range(1, MOST_ROUNDS):
        if done >= FEWEST_ROUNDS and clock() - start > budget_s:
            break
        for place, call in enumerate(calls):
            repetitions = max(1, math.ceil(TURN_S / max(best[place], 1e-6)))
            best[place] = min(best[place], _seconds(call, repetitions, clock))
    return [1e3 * seconds for seconds in best]


def _seconds(call: Call, repetitions: int, clock: Clock) -> float:
    start = clock()
    for _ in range(repetitions):
        call()
    return (clock() - start) / repetitions
