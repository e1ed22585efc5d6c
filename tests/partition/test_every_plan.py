"""The plan is the best of all that the cost model allows, by going through every one of them on random small cases.

Models differ in blocks, heads, vocabulary and tying; clusters in classes, nodes, memory and links.
"""

import random
from dataclasses import replace

import pytest

from llmopt.errors import BudgetError
from llmopt.partition import conditions, orders
from llmopt.partition.promises import Promise
from tests.partition.every_plan import METRICS, cost, every_plan, random_search

WHOLE = range(0, 200, 50)
HALF = range(0, 100, 50)


def planned(search):
    try:
        return search.plan()
    except BudgetError:
        return None


def best_of_all(search):
    """The least cost of all plans that keep the promises, or None."""
    promises = search.wanted.promises
    kept = [pair for pair in every_plan(search) if all(promise.kept(pair[0]) for promise in promises)]
    return min((cost(search, *pair) for pair in kept), default=None)


def require_the_best(search, seed):
    wanted, plan = best_of_all(search), planned(search)
    assert (plan is None) == (wanted is None), seed
    if plan is not None:
        assert plan.value == pytest.approx(wanted, rel=1e-9), seed
        assert plan.gap == pytest.approx(0, abs=1e-8), seed


def shuffled(search, seed):
    """The same in some order of its devices, in which a node may come again."""
    names = [device.name for device in search.cluster.all_devices()]
    random.Random(seed).shuffle(names)
    return replace(search, wanted=replace(search.wanted, order=tuple(names)))


def promising(search, seed):
    """The same with one to three promises, about what some plan does, or a little more or less."""
    draw = random.Random(seed)
    some = [predicted for predicted, _ in every_plan(search)]
    if not some:
        return search
    reached = draw.choice(some)
    names = draw.sample(METRICS, draw.randint(1, 3))
    promises = [Promise(name=name, bound=getattr(reached, name) * draw.choice([0.9, 1.0, 1.0, 1.1])) for name in names]
    return replace(search, wanted=replace(search.wanted, promises=tuple(promises)))


def costing(search, seed):
    return replace(search, wanted=replace(search.wanted, objective=random.Random(seed).choice(["devices", "price"])))


@pytest.mark.parametrize("first", WHOLE)
def test_in_any_order_no_plan_is_better(first):
    for seed in range(first, first + 50):
        require_the_best(random_search(seed), seed)


@pytest.mark.parametrize("first", WHOLE)
def test_in_a_given_order_no_plan_is_better(first):
    for seed in range(first, first + 50):
        require_the_best(shuffled(random_search(seed), seed), seed)


@pytest.mark.parametrize("first", WHOLE)
def test_under_several_promises_no_plan_is_better(first):
    for seed in range(first, first + 50):
        require_the_best(promising(random_search(seed), seed), seed)


@pytest.mark.parametrize("first", HALF)
def test_under_several_promises_no_plan_in_that_order_is_better(first):
    for seed in range(first, first + 50):
        require_the_best(promising(shuffled(random_search(seed), seed), seed), seed)


@pytest.mark.parametrize("first", HALF)
def test_no_plan_has_fewer_or_cheaper_devices(first):
    for seed in range(first, first + 50):
        require_the_best(costing(random_search(seed), seed), seed)
        require_the_best(costing(promising(random_search(seed), seed), seed), seed)


@pytest.mark.parametrize("first", HALF)
def test_where_there_are_too_many_orders_the_bound_is_one_and_the_plan_says_what_is_not_known(first, monkeypatch):
    for module in (orders, conditions):
        monkeypatch.setattr(module, "ways_in_any_order", lambda machine, devices: None)
    for seed in range(first, first + 50):
        search = promising(random_search(seed, devices=5), seed)
        wanted, plan = best_of_all(search), planned(search)
        if plan is None:
            continue  # it may be missed, and the error says so
        assert plan.lower_bound_ms <= wanted * (1 + 1e-9)
        assert plan.value >= wanted * (1 - 1e-9)
        assert all(promise.kept(plan.predicted) for promise in search.wanted.promises)
        assert any("not proven" in note for note in plan.notes) == (plan.gap > 1e-6)
