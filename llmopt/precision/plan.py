"""A plan: which scheme each group gets under a budget, and what that is expected to cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmopt.errors import BudgetError
from llmopt.precision.allocate import (
    Option,
    least_bytes,
    least_loss,
    smallest_loss,
    total_bytes,
    total_loss,
)
from llmopt.precision.budget import BitsBudget, Budget, PerplexityBudget, SizeBudget
from llmopt.precision.groups import Group
from llmopt.quantize.scheme import Scheme

# The logarithm of perplexity grows by about this much of the KL divergence. By as much as the KL divergence if the text
# were the model's own; on WikiText, quantized in twelve ways, SmolLM2-135M showed 0.56 to 1.04.
LOG_PERPLEXITY_PER_KL = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Groups, with what each of their candidates costs; `overhead_bytes` is all that no scheme applies to."""

    groups: tuple[Group, ...]
    options: tuple[tuple[Option, ...], ...]
    overhead_bytes: int

    @property
    def weights(self) -> int:
        """In all groups."""
        return sum(group.weights for group in self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What an artifact that was made showed: bytes that were not foreseen, and losses larger than predicted."""

    more_bytes: int = 0
    more_loss: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A solved problem: `choice` has the index of each group's candidate."""

    budget: Budget
    problem: Problem
    correction: Correction
    choice: tuple[int, ...]

    @property
    def predicted_kl(self) -> float:
        """Nats a token."""
        return total_loss(self.problem.options, self.choice) * self.correction.more_loss

    @property
    def predicted_perplexity(self) -> float:
        """How much higher than the float model's, relatively."""
        return math.expm1(self.predicted_kl * LOG_PERPLEXITY_PER_KL)

    @property
    def model_bytes(self) -> int:
        """Graph and weights."""
        stored = total_bytes(self.problem.options, self.choice)
        return stored + self.problem.overhead_bytes + self.correction.more_bytes

    @property
    def bits(self) -> float:
        """Stored bits a weight."""
        return total_bytes(self.problem.options, self.choice) * 8 / self.problem.weights

    def schemes(self) -> Mapping[str, Scheme | None]:
        """What each layer gets."""
        chosen = zip(self.problem.groups, self.choice, strict=True)
        return {layer: group.candidates[index] for group, index in chosen for layer in group.layers}

    @property
    def slack(self) -> float:
        """What the budget leaves: bytes, or nats of predicted loss, before any correction."""
        if isinstance(self.budget, PerplexityBudget):
            return _loss_bound(self.budget, self.correction) - total_loss(self.problem.options, self.choice)
        limit = _bytes_left(self.problem, self.budget, self.correction.more_bytes)
        return limit - total_bytes(self.problem.options, self.choice)


def solve(problem: Problem, budget: Budget, correction: Correction | None = None) -> Plan:
    """The plan with the least predicted loss within a size, or the least size within a predicted loss.

    Raises:
        BudgetError: nothing is within the budget.
    """
    correction = correction or Correction()
    if isinstance(budget, PerplexityBudget):
        choice = least_bytes(problem.options, _loss_bound(budget, correction))
        if choice is None:
            least = math.expm1(smallest_loss(problem.options) * correction.more_loss * LOG_PERPLEXITY_PER_KL)
            raise BudgetError(f"no schemes keep to {budget}: the least that can be expected is {least:+.2%}")
    else:
        require_reachable(problem.groups, problem.overhead_bytes + correction.more_bytes, budget)
        choice = least_loss(problem.options, _bytes_left(problem, budget, correction.more_bytes))
        assert choice is not None
    return Plan(budget=budget, problem=problem, correction=correction, choice=choice)


def require_reachable(groups: Sequence[Group], overhead_bytes: int, budget: Budget) -> None:
    """See that the smallest schemes are within a budget, which needs no weights.

    Raises:
        BudgetError: they are not. A bound of perplexity is not known to be out of reach before losses are.
    """
    smallest = sum(min(map(group.stored_bytes, group.candidates)) for group in groups)
    if isinstance(budget, SizeBudget) and smallest + overhead_bytes > budget.model_bytes:
        # Rounded up, so that what is named can be had.
        reachable = math.ceil((smallest + overhead_bytes) / 1e4) / 100
        raise BudgetError(f"no schemes fit into {budget}: the smallest that can be reached is {reachable:.2f}MB")
    weights = sum(group.weights for group in groups)
    if isinstance(budget, BitsBudget) and smallest * 8 > budget.bits * weights:
        reachable = math.ceil(smallest * 8 / weights * 1e3) / 1e3
        raise BudgetError(f"no schemes fit into {budget}: the fewest that can be reached are {reachable:.3f}bits")


def _bytes_left(problem: Problem, budget: SizeBudget | BitsBudget, more_bytes: int) -> int:
    if isinstance(budget, SizeBudget):
        return budget.model_bytes - problem.overhead_bytes - more_bytes
    return int(budget.bits * problem.weights / 8)


def _loss_bound(budget: PerplexityBudget, correction: Correction) -> float:
    return math.log1p(budget.relative) / (LOG_PERPLEXITY_PER_KL * correction.more_loss)
