"""Plans keep to their budgets, say what cannot be reached, and explain themselves truthfully."""

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from llmopt.errors import BudgetError
from llmopt.precision.allocate import Option, total_bytes, total_loss, worthwhile
from llmopt.precision.budget import BitsBudget, PerplexityBudget, SizeBudget, parse_budget
from llmopt.precision.explain import explain, plan_json
from llmopt.precision.groups import CANDIDATES, Group
from llmopt.precision.plan import Correction, Problem, require_reachable, solve

OVERHEAD = 5_000


def problem(seed=0, groups=4):
    rng = np.random.default_rng(seed)
    made, options = [], []
    for number in range(groups):
        group = Group((f"layer{number}",), ((int(rng.integers(64, 400)), 128),), CANDIDATES[:5] + CANDIDATES[6:7])
        level = rng.lognormal(-1, 1.5)
        made.append(group)
        options.append(
            tuple(
                Option(
                    stored_bytes=group.stored_bytes(scheme), loss=float(level * 4.0**-scheme.bits * rng.uniform(0.5, 2))
                )
                for scheme in group.candidates
            )
        )
    return Problem(groups=tuple(made), options=tuple(options), overhead_bytes=OVERHEAD)


def sizes(of):
    smallest = sum(min(option.stored_bytes for option in options) for options in of.options)
    largest = sum(max(option.stored_bytes for option in options) for options in of.options)
    return smallest + OVERHEAD, largest + OVERHEAD


def test_size_and_bits_are_kept_to_and_more_of_them_lose_less():
    given = problem()
    budgets = [SizeBudget(int(size)) for size in np.linspace(*sizes(given), 7)]
    plans = [solve(given, budget) for budget in budgets]
    assert all(plan.model_bytes <= budget.model_bytes for plan, budget in zip(plans, budgets, strict=True))
    losses = [plan.predicted_kl for plan in plans]
    assert losses == sorted(losses, reverse=True)
    for bits in (4.5, 5.5, 8.0):
        plan = solve(given, BitsBudget(bits))
        assert plan.bits <= bits
        assert plan.bits == pytest.approx(8 * (plan.model_bytes - OVERHEAD) / given.weights)


def test_a_bound_of_perplexity_is_predicted_to_be_kept_to_and_a_looser_one_takes_fewer_bytes():
    plans = [solve(problem(), PerplexityBudget(relative)) for relative in (0.001, 0.003, 0.01)]
    assert [plan.predicted_perplexity <= plan.budget.relative for plan in plans] == [True] * 3
    assert plans[0].model_bytes > plans[1].model_bytes > plans[2].model_bytes


@pytest.mark.parametrize("kind", ["MB", "bits"])
def test_what_is_named_as_the_smallest_can_be_reached(kind):
    given = problem()
    with pytest.raises(BudgetError, match="can be reached") as caught:
        solve(given, parse_budget(f"0.01{kind}"))
    named = re.search(r"[\d.]+(MB|bits)$", caught.value.what)[0]
    assert named.endswith(kind)
    solve(given, parse_budget(named))
    require_reachable(given.groups, OVERHEAD, parse_budget(named))


def test_a_bound_that_nothing_keeps_to_names_the_least_loss():
    with pytest.raises(BudgetError, match="the least that can be expected is"):
        solve(problem(), PerplexityBudget(1e-9))


def test_what_an_artifact_showed_is_taken_into_account():
    given = problem()
    budget = SizeBudget(sum(sizes(given)) // 2)
    assert solve(given, budget, Correction(more_bytes=2_000)).model_bytes <= budget.model_bytes
    stored = [
        total_bytes(given.options, solve(given, budget, Correction(more_bytes=more)).choice) for more in (0, 9_000)
    ]
    assert stored[1] < stored[0]
    loose, tight = (solve(given, PerplexityBudget(0.01), Correction(more_loss=factor)) for factor in (1.0, 3.0))
    assert tight.model_bytes > loose.model_bytes
    assert tight.predicted_perplexity <= 0.01


@pytest.mark.parametrize("budget", [SizeBudget(92_000), PerplexityBudget(0.004)])
@pytest.mark.parametrize("seed", range(4))
def test_the_next_best_is_that_of_every_exchange_with_one_other_group(budget, seed):
    given = problem(seed)
    if isinstance(budget, SizeBudget):
        low, high = sizes(given)
        budget = SizeBudget(low + (high - low) // 3)
    plan = solve(given, budget)
    for position, told in enumerate(explain(plan)):
        worse_by = {
            scheme: min(worse(plan, [(position, index), *other]) for other in others(plan, position))
            for index, scheme in enumerate(given.groups[position].candidates)
            if index != plan.choice[position] and index in worthwhile(given.options[position])
        }
        assert min(worse_by.values()) >= 0
        assert worse_by[told.next_best.scheme] == min(worse_by.values())


def others(plan, position):
    """No move of another group, or any one."""
    yield []
    for other, options in enumerate(plan.problem.options):
        if other != position:
            for index in range(len(options)):
                yield [(other, index)]


def worse(plan, moves):
    """By how much some moves make a plan worse; infinitely, if they leave its budget."""
    choice = list(plan.choice)
    for position, index in moves:
        choice[position] = index
    options = plan.problem.options
    moved = replace(plan, choice=tuple(choice))
    if moved.slack < 0:
        return np.inf
    if isinstance(plan.budget, PerplexityBudget):
        return total_bytes(options, choice) - total_bytes(options, plan.choice)
    return total_loss(options, choice) - total_loss(options, plan.choice)


def test_a_plan_as_json_holds_every_group_once_with_the_sums():
    plan = solve(problem(), BitsBudget(5.0))
    value = plan_json(plan, explain(plan))
    assert sum(group["bytes"] for group in value["groups"]) + OVERHEAD == value["predicted"]["size_bytes"]
    losses = [group["predicted_kl_divergence"] for group in value["groups"]]
    assert sum(losses) == pytest.approx(value["predicted"]["kl_divergence"])
    assert value["budget"] == "5bits"


def test_a_layer_without_a_choice_has_no_next_best():
    given = problem()
    fixed = replace(given.groups[1], candidates=given.groups[1].candidates[:1])
    options = (given.options[0], given.options[1][:1], *given.options[2:])
    plan = solve(replace(given, groups=(given.groups[0], fixed, *given.groups[2:]), options=options), BitsBudget(5.0))
    assert [told.next_best is None for told in explain(plan)] == [False, True, False, False]


def test_every_allocation_within_a_budget_loses_at_least_as_much():
    given = problem(seed=1)
    budget = SizeBudget(sum(sizes(given)) // 2)
    best = min(
        total_loss(given.options, choice)
        for choice in product(*(range(len(options)) for options in given.options))
        if total_bytes(given.options, choice) + OVERHEAD <= budget.model_bytes
    )
    assert solve(given, budget).predicted_kl == pytest.approx(best, rel=1e-4)
