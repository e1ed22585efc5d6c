"""What is found is the least that there is, by going through every plan of random small problems."""

import itertools
import math

import pytest

from llmopt.partition.solver.classes import AnyOrder, Grouping
from llmopt.partition.solver.fixed import FixedOrder
from llmopt.partition.solver.joining import best
from llmopt.partition.solver.prices import Prices
from tests.partition.brute import brute_force, case, slots_of, worth


def value(kinds, slots, objective, pieces):
    groups = [(piece.slot, piece.kind) for piece in pieces]
    return worth(kinds, slots, objective, groups, (0, *(piece.stop for piece in pieces)))


def found_in(order, objective):
    alone = order.alone()
    several = best(order, objective)
    plans = [each for each in ([alone] if alone else None, several) if each]
    return min((value(order.kinds, order.slots, objective, plan) for plan in plans), default=math.inf)


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_a_fixed_order_is_cut_as_well_as_any_cut(first):
    for seed in range(first, first + 100):
        kinds, options, devices, hops, objective = case(seed)
        slots = slots_of(devices, options, hops)
        found = found_in(FixedOrder(kinds=kinds, slots=slots), objective)
        assert found == pytest.approx(brute_force(kinds, slots, objective), rel=1e-9), seed


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_classes_in_any_order_are_cut_as_well_as_in_the_best(first):
    for seed in range(first, first + 50):
        kinds, options, devices, hops, objective = case(seed, uniform=True)
        names = [name for name, _ in devices]
        wanted = math.inf
        for order in set(itertools.permutations(names)):
            slots = slots_of([(name, place) for place, name in enumerate(order)], options, hops)
            wanted = min(wanted, brute_force(kinds, slots, objective))
        counts = [names.count(name) for name in options]
        groupings = [Grouping(place, 1, 1) for place in range(len(kinds))]
        free = AnyOrder(kinds=kinds, groupings=groupings, counts=counts, hops_s=[hops[1]] * len(kinds))
        several = best(free, objective)
        there = [kind for kind, count in zip(kinds, counts, strict=True) if count and math.isfinite(kind.alone())]
        values = [objective.value(kind.alone(), kind.alone()) for kind in there]
        if several is not None:
            values.append(
                value(
                    kinds,
                    slots_of([(name, place) for place, name in enumerate(names)], options, hops),
                    objective,
                    several,
                )
            )
        assert min(values, default=math.inf) == pytest.approx(wanted, rel=1e-9), seed


@pytest.mark.parametrize("first", range(0, 200, 100))
def test_prices_of_devices_give_a_bound_that_no_stages_are_below(first):
    reached = []
    for seed in range(first, first + 100):
        kinds, options, devices, hops, objective = case(seed, uniform=True)
        names = [name for name, _ in devices]
        groupings = [Grouping(place, 1, 1) for place in range(len(kinds))]
        counts = [names.count(name) for name in options]
        free = AnyOrder(kinds=kinds, groupings=groupings, counts=counts, hops_s=[hops[1]] * len(kinds))
        pieces = best(free, objective)
        if pieces is None:
            continue
        seconds = free.seconds(pieces)
        worth_s = objective.value(sum(seconds), max(seconds))
        bound = Prices(problem=free).raised(objective, 0.0, 2 * worth_s)
        assert bound <= worth_s * (1 + 1e-9), seed
        reached.append(bound / worth_s)
    assert sum(reached) / len(reached) > 0.85
