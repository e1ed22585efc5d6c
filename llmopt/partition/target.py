"""What one setting has to offer: the best plan in it that keeps the promises, and what nothing in it is below."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmopt.partition.candidate import Candidate, candidate_from
from llmopt.partition.cluster import Device
from llmopt.partition.conditions import Bounds, solve_under
from llmopt.partition.machine import Metric
from llmopt.partition.orders import Found, Solution, solve_any_order, solve_order
from llmopt.partition.promises import Promise, bounds_of
from llmopt.partition.settings import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A plan, if there is one, and what nothing is below; infinite where it is proven that there is nothing."""

    candidate: Candidate | None
    bound: float


NOTHING = Answer(candidate=None, bound=math.inf)


def answer_for_metric(
    setting: Setting, metric: Metric, promises: tuple[Promise, ...], *, in_order: bool, below: float = math.inf
) -> Answer:
    """The least of a metric that is below a value. `below` and the bound are in the metric's unit."""
    machine, unit = setting.machine, setting.machine.unit(metric)
    free = _solve(setting, metric, in_order=in_order, at_most=below / unit)
    if free.solution is None:
        return Answer(candidate=None, bound=free.bound * unit)
    candidate = candidate_from(machine, free.solution)
    if candidate.keeps(promises):
        return Answer(candidate=candidate, bound=free.bound * unit)
    bounds = bounds_of(promises, machine)
    solutions = [free.solution]
    for other in bounds:
        found = _solve(setting, other, in_order=in_order) if other != metric else free
        if found.bound > bounds[other]:
            return NOTHING  # that one promise alone cannot be kept
        solutions += [found.solution] if found.solution is not None else []
    return _compromise(setting, metric, promises, solutions, in_order=in_order, below=below)


def _compromise(
    setting: Setting,
    metric: Metric,
    promises: tuple[Promise, ...],
    solutions: Sequence[Solution],
    *,
    in_order: bool,
    below: float,
) -> Answer:
    """Where what is best for one thing breaks a promise about another: `solutions` are the best for each."""
    machine, unit = setting.machine, setting.machine.unit(metric)
    bounds = bounds_of(promises, machine)
    best, value = None, below / unit
    for solution in solutions:
        candidate = candidate_from(machine, solution)
        if candidate.keeps(promises) and (seconds := _seconds(candidate, metric)) <= value:
            best, value = candidate, seconds
    found = solve_under(machine, setting.devices, metric, bounds, in_order=in_order, at_most=value)
    if found.solution is not None:
        return Answer(candidate=candidate_from(machine, found.solution), bound=found.bound * unit)
    if math.isinf(found.bound):
        return Answer(candidate=best, bound=value * unit) if best is not None else NOTHING
    lowest = max(found.bound, solutions[0].bound)
    if not in_order:
        for solution in _in_their_orders(setting, metric, bounds, [one.devices for one in solutions], value):
            candidate = candidate_from(machine, solution)
            if (seconds := _seconds(candidate, metric)) <= value:
                best, value = candidate, seconds
    return Answer(candidate=best, bound=min(lowest, value) * unit)


def _in_their_orders(
    setting: Setting, metric: Metric, bounds: Bounds, orders: Sequence[tuple[Device, ...]], at_most: float
) -> Iterator[Solution]:
    for order in dict.fromkeys(orders):
        found = solve_under(setting.machine, order, metric, bounds, in_order=True, at_most=at_most)
        if found.solution is not None:
            yield found.solution


def _solve(setting: Setting, metric: Metric, *, in_order: bool, at_most: float = math.inf) -> Found:
    if not in_order:
        return solve_any_order(setting.machine, setting.devices, metric, at_most)
    solution = solve_order(setting.machine, setting.devices, metric, at_most)
    return Found(solution=solution, bound=solution.bound if solution is not None else math.inf)


def _seconds(candidate: Candidate, metric: Metric) -> float:
    if metric == "throughput":
        return 1000 / candidate.predicted.throughput_tokens_per_s / candidate.machine.unit(metric)
    return float(getattr(candidate.predicted, f"{metric}_ms")) / candidate.machine.unit(metric)
