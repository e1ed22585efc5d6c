"""Allocation under a budget: one option for each group, by an integer program.

    least loss:   min Σ loss[g, o] x[g, o]   with Σ bytes[g, o] x[g, o] ≤ budget
    least bytes:  min Σ bytes[g, o] x[g, o]  with Σ loss[g, o] x[g, o] ≤ bound

where each group g takes one of its options, Σ_o x[g, o] = 1, x[g, o] ∈ {0, 1}: the multiple-choice knapsack problem.
HiGHS solves it through scipy. It works with tolerances, so what it gives is held against the budget in whole bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

# Of the optimum: the bound that the solver proves is this close. Losses are estimated far less well than this.
GAP = 1e-5
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What one choice for a group costs: bytes, and nats a token."""

    stored_bytes: int
    loss: float


Options = Sequence[Sequence[Option]]  # of each group, at least one


def smallest_bytes(groups: Options) -> int:
    """The fewest bytes that any allocation takes."""
    return sum(min(option.stored_bytes for option in options) for options in groups)


def smallest_loss(groups: Options) -> float:
    """The least loss that any allocation has."""
    return sum(min(option.loss for option in options) for options in groups)


def total_bytes(groups: Options, choice: Sequence[int]) -> int:
    """Bytes of an allocation."""
    return sum(options[index].stored_bytes for options, index in zip(groups, choice, strict=True))


def total_loss(groups: Options, choice: Sequence[int]) -> float:
    """Loss of an allocation: losses of groups add up to second order."""
    return sum(options[index].loss for options, index in zip(groups, choice, strict=True))


def least_loss(groups: Options, budget_bytes: int) -> tuple[int, ...] | None:
    """The index of each group's option, so that the loss is least within so many bytes; None if nothing fits."""
    if smallest_bytes(groups) > budget_bytes:
        return None
    return _within(groups, total_bytes, budget_bytes, minimize="loss")


def least_bytes(groups: Options, loss_bound: float) -> tuple[int, ...] | None:
    """The index of each group's option, so that bytes are fewest at no more than this loss; None if nothing is."""
    if smallest_loss(groups) > loss_bound:
        return None
    return _within(groups, total_loss, loss_bound, minimize="stored_bytes")


def worthwhile(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no other one beats in both: from one to the next more bytes, and less loss."""
    order = sorted(range(len(options)), key=lambda index: (options[index].stored_bytes, options[index].loss, index))
    kept: list[int] = []
    for index in order:
        if not kept or options[index].loss < options[kept[-1]].loss:
            kept.append(index)
    return kept


def _within(
    groups: Options,
    total: Callable[[Options, Sequence[int]], float],
    bound: float,
    *,
    minimize: Literal["loss", "stored_bytes"],
) -> tuple[int, ...]:
    kept = [worthwhile(options) for options in groups]
    limit = bound
    while limit > 0:
        choice = _solve(groups, kept, limit, minimize)
        if choice is None:
            break
        excess = total(groups, choice) - bound
        if excess <= 0:
            return choice
        limit -= max(excess, TOLERANCE * bound)  # it is within the solver's tolerance, and not within the bound
    # Nothing but this is, to the solver's tolerance.
    return tuple(indices[0 if minimize == "loss" else -1] for indices in kept)


def _solve(
    groups: Options, kept: Sequence[Sequence[int]], limit: float, minimize: Literal["loss", "stored_bytes"]
) -> tuple[int, ...] | None:
    options = [group[index] for group, indices in zip(groups, kept, strict=True) for index in indices]
    ends = np.cumsum([len(indices) for indices in kept])
    starts = ends - [len(indices) for indices in kept]
    size = np.array([float(option.stored_bytes) for option in options])
    loss = np.array([option.loss for option in options])
    objective, cost = (loss, size) if minimize == "loss" else (size, loss)
    group_of = np.repeat(np.arange(len(kept)), ends - starts)
    one_each = coo_array((np.ones(len(options)), (group_of, np.arange(len(options))))).tocsr()
    unit = limit * TOLERANCE  # so that the solver's tolerance is as small a share of the limit
    found = milp(
        objective / (objective.max() or 1.0),
        integrality=np.ones(len(options), np.int64),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost[None] / unit, ub=1e6)],
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        return None
    picked = [int(found.x[start:end].argmax()) for start, end in zip(starts, ends, strict=True)]
    return tuple(indices[pick] for indices, pick in zip(kept, picked, strict=True))
