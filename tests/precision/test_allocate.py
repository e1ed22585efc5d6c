"""The integer program finds what trying everything finds."""

from itertools import product

import numpy as np
import pytest

from llmopt.precision.allocate import (
    Option,
    least_bytes,
    least_loss,
    smallest_bytes,
    smallest_loss,
    total_bytes,
    total_loss,
    worthwhile,
)


def groups_of(seed, groups=5, options=4):
    """Groups of very different sizes; more bytes mostly lose less, by factors and not by steps."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(groups):
        weights, level = int(rng.integers(1e4, 1e6)), rng.lognormal(-6, 2)
        bits = np.sort(rng.uniform(3, 9, options))
        found.append(
            [Option(stored_bytes=int(weights * b), loss=float(level * 4**-b * rng.uniform(0.3, 3))) for b in bits]
        )
    return found


def every_allocation(groups):
    return list(product(*(range(len(options)) for options in groups)))


def largest_bytes(groups):
    return sum(max(option.stored_bytes for option in options) for options in groups)


@pytest.mark.parametrize("seed", range(8))
def test_the_least_loss_within_bytes_is_that_of_trying_everything(seed):
    groups = groups_of(seed)
    for budget in np.linspace(smallest_bytes(groups), largest_bytes(groups), 6).astype(int).tolist():
        choice = least_loss(groups, budget)
        assert total_bytes(groups, choice) <= budget
        fitting = [one for one in every_allocation(groups) if total_bytes(groups, one) <= budget]
        best = min(total_loss(groups, one) for one in fitting)
        assert total_loss(groups, choice) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_the_fewest_bytes_within_a_loss_are_those_of_trying_everything(seed):
    groups = groups_of(seed)
    for factor in (1.0, 1.5, 4.0, 50.0):
        bound = smallest_loss(groups) * factor
        choice = least_bytes(groups, bound)
        assert total_loss(groups, choice) <= bound
        fitting = [one for one in every_allocation(groups) if total_loss(groups, one) <= bound]
        best = min(total_bytes(groups, one) for one in fitting)
        assert total_bytes(groups, choice) == pytest.approx(best, rel=1e-4)


def test_more_bytes_never_lose_more_with_as_many_groups_as_a_model_has():
    groups = groups_of(0, groups=120, options=8)
    smallest = smallest_bytes(groups)
    losses = [total_loss(groups, least_loss(groups, int(smallest * share))) for share in np.linspace(1, 2.5, 6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 10


def test_what_does_not_fit_has_no_allocation():
    groups = groups_of(0)
    assert least_loss(groups, smallest_bytes(groups) - 1) is None
    assert least_bytes(groups, smallest_loss(groups) * 0.999) is None


@pytest.mark.parametrize("seed", range(4))
def test_a_bound_that_one_allocation_alone_keeps_to_is_kept_to(seed):
    """Where the solver's tolerance is larger than what is left."""
    groups = groups_of(seed, groups=30)
    for more in (0, 1, 2, 5):
        choice = least_loss(groups, smallest_bytes(groups) + more)
        assert smallest_bytes(groups) <= total_bytes(groups, choice) <= smallest_bytes(groups) + more
    for factor in (1.0, 1 + 1e-12, 1 + 1e-9, 1 + 1e-7):
        bound = smallest_loss(groups) * factor
        assert total_loss(groups, least_bytes(groups, bound)) <= bound


def test_a_group_without_a_choice_and_one_without_a_loss_are_allocated():
    only, free = Option(stored_bytes=10, loss=0.5), Option(stored_bytes=7, loss=0.0)
    assert least_loss([[only], [free]], 17) == (0, 0)
    assert least_bytes([[only], [free]], 0.5) == (0, 0)
    assert least_bytes([[free]], 0.0) == (0,)


def test_an_option_that_another_beats_in_both_is_not_worthwhile():
    sizes_and_losses = [(10, 1.0), (12, 1.0), (11, 0.5), (9, 2.0), (11, 0.7), (20, 0.6)]
    options = [Option(stored_bytes=size, loss=loss) for size, loss in sizes_and_losses]
    assert worthwhile(options) == [3, 0, 2]
