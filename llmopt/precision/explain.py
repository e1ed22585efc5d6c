"""Why a plan is what it is: for each group the scheme that it came closest to getting, and what was against it.

A plan is the best there is, so no exchange makes it better: another scheme for a group that loses more frees bytes,
which save less elsewhere; one that loses less needs bytes, which cost more elsewhere. The next best is the scheme whose
best exchange with one other group makes the plan worse by the least. Where perplexity is bounded and bytes are to be
few, the two change places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmopt.precision.allocate import Option, worthwhile
from llmopt.precision.budget import PerplexityBudget
from llmopt.precision.groups import Group
from llmopt.precision.plan import Plan
from llmopt.quantize.scheme import Scheme

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextBest:
    """The scheme that a group came closest to getting, what it would cost the group, and why it did not get it."""

    scheme: Scheme | None
    cost: Option
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """What a group got and what that costs; `next_best` is None where nothing else is smaller or loses less."""

    group: Group
    scheme: Scheme | None
    cost: Option
    next_best: NextBest | None

    def to_json(self) -> dict[str, Any]:
        """The form that a report holds."""
        got = {"layers": list(self.group.layers), **_cost_json(self.scheme, self.cost)}
        other = self.next_best
        return got | {
            "next_best": None if other is None else {**_cost_json(other.scheme, other.cost), "reason": other.reason}
        }


def explain(plan: Plan) -> tuple[Explained, ...]:
    """Every group, in the order of the model."""
    problem, exchanges = plan.problem, _Exchanges(plan)
    return tuple(
        Explained(
            group=group,
            scheme=group.candidates[index],
            cost=options[index],
            next_best=exchanges.next_best(position),
        )
        for position, (group, options, index) in enumerate(
            zip(problem.groups, problem.options, plan.choice, strict=True)
        )
    )


class _Exchanges:
    """All that could be changed in one group, as changes of what is bounded and of what is to be least."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.bounds_loss = isinstance(plan.budget, PerplexityBudget)
        self.moves = [
            (position, index)
            for position, options in enumerate(plan.problem.options)
            for index in worthwhile(options)
            if index != plan.choice[position]
        ]
        self.group_M = np.array([position for position, _ in self.moves])
        changes = np.array([self._change(*move) for move in self.moves]).reshape(-1, 2)
        self.bounded_M, self.least_M = changes[:, 0], changes[:, 1]

    def _change(self, position: int, index: int) -> tuple[float, float]:
        options = self.plan.problem.options[position]
        now, then = options[self.plan.choice[position]], options[index]
        size, loss = float(then.stored_bytes - now.stored_bytes), then.loss - now.loss
        return (loss, size) if self.bounds_loss else (size, loss)

    def next_best(self, position: int) -> NextBest | None:
        """The move of a group that makes the plan worse by the least, with what else would have to change."""
        own = [number for number, (group, _) in enumerate(self.moves) if group == position]
        if not own:
            return None
        elsewhere = [self._elsewhere(number) for number in own]
        nearest = int(np.argmin(self.least_M[own] + elsewhere))
        _, index = self.moves[own[nearest]]
        return NextBest(
            scheme=self.plan.problem.groups[position].candidates[index],
            cost=self.plan.problem.options[position][index],
            reason=self._reason(own[nearest], elsewhere[nearest]),
        )

    def _elsewhere(self, number: int) -> float:
        """What the best move of another group adds, if that keeps within the bound; infinite if none does."""
        room = self.plan.slack - self.bounded_M[number]
        possible_M = (self.group_M != self.group_M[number]) & (self.bounded_M <= room)
        best = float(self.least_M[possible_M].min(initial=np.inf))
        return min(best, 0.0) if room >= 0 else best  # with room left, none has to move

    def _reason(self, number: int, elsewhere: float) -> str:
        change = float(self.least_M[number])
        if change >= 0:
            return f"would cost {self._amount(change)}, and what it frees saves at most {self._amount(abs(elsewhere))}"
        if np.isinf(elsewhere):
            return f"would save {self._amount(-change)}, and no other group can make room for it"
        return f"would save {self._amount(-change)}, and making room for it costs {self._amount(elsewhere)} or more"

    def _amount(self, value: float) -> str:
        return f"{value / 1e3:.3g} kB" if self.bounds_loss else f"{value * 1e3:.3g} mnat"


def _cost_json(scheme: Scheme | None, cost: Option) -> dict[str, Any]:
    name = None if scheme is None else scheme.name
    return {"scheme": name, "bytes": cost.stored_bytes, "predicted_kl_divergence": cost.loss}


def plan_json(plan: Plan, explained: Sequence[Explained]) -> dict[str, Any]:
    """A plan, as a report holds it."""
    return {
        "budget": str(plan.budget),
        "predicted": {
            "size_bytes": plan.model_bytes,
            "bits_per_weight": plan.bits,
            "kl_divergence": plan.predicted_kl,
            "perplexity_change": plan.predicted_perplexity,
        },
        "groups": [one.to_json() for one in explained],
    }
