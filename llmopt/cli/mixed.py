"""What lies behind a result: `--explain` and `--plot` of `llmopt quantize`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmopt.pipeline.estimate import Estimate
    from llmopt.precision.explain import Explained
    from llmopt.precision.plan import Plan

GROUP_COLUMNS = ("group", "scheme", "MB", "loss, mnat", "next best", "why not")
PICTURES = (".png", ".svg")


@dataclass(frozen=True)
class Shown:
    """What is to be shown beside a result."""

    explain: bool
    plot: Path | None

    def check(self, *, has_budget: bool) -> None:
        """Fail before anything is computed.

        Raises:
            UsageError: there will be no plan, or no way to draw it.
        """
        from importlib.util import find_spec

        from llmopt.errors import UsageError

        if not has_budget and self.plot is not None:
            raise UsageError("--plot draws the plan of a budget, and there is none", hint="--budget 92MB")
        if self.plot is None:
            return
        if self.plot.suffix not in PICTURES:
            raise UsageError(f"{str(self.plot)!r} is no picture", hint=f"--plot FILE{' or FILE'.join(PICTURES)}")
        if not self.plot.absolute().parent.is_dir():
            raise UsageError("the folder to draw into does not exist", where=str(self.plot.parent))
        if find_spec("matplotlib") is None:
            raise UsageError("--plot needs matplotlib", hint="pip install 'llmopt[plot]'")

    def table(self, plan: "Plan | None") -> list[tuple[str, ...]]:
        """Cells as in `GROUP_COLUMNS`, if they were asked for."""
        if not self.explain or plan is None:
            return []
        from llmopt.precision.explain import explain

        return [_row(one) for one in explain(plan)]

    def memory(self, needed: "Estimate", peak_bytes: int | None = None) -> list[str]:
        """What each step was predicted to take, and what was really taken, if that was asked for and is known."""
        if not self.explain:
            return []
        steps = ", ".join(f"{step} {held / 1e6:,.0f} MB" for step, held in needed.memory_by_step().items())
        taken = [] if peak_bytes is None else [f"resident at the peak: {peak_bytes / 1e6:,.0f} MB"]
        return [f"predicted resident memory: {steps}", *taken]

    def draw(self, plan: "Plan") -> None:
        """The picture, if it was asked for."""
        if self.plot is not None:
            from llmopt.pipeline.picture import draw_plan

            draw_plan(plan, self.plot)


def plan_line(plan: "Plan") -> str:
    """What is predicted."""
    return (
        f"{plan.budget}: at most {plan.model_bytes / 1e6:,.2f} MB, {plan.bits:.3f} bits a weight; predicted KL "
        f"divergence {plan.predicted_kl:.4f} nats, perplexity {plan.predicted_perplexity:+.1%}"
    )


def _row(one: "Explained") -> tuple[str, ...]:
    got = (one.group.name, _scheme(one.scheme), f"{one.cost.stored_bytes / 1e6:.3f}", f"{one.cost.loss * 1e3:.4f}")
    if one.next_best is None:
        alone = "a pattern names it" if len(one.group.candidates) == 1 else "no other is smaller or loses less"
        return (*got, "", alone)
    return (*got, _scheme(one.next_best.scheme), one.next_best.reason)


def _scheme(scheme: object) -> str:
    return "float32" if scheme is None else str(scheme)
