"""A plan as a picture: predicted loss against size for many budgets, and what each layer got under this one."""

from pathlib import Path

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llmopt.precision.budget import SizeBudget
from llmopt.precision.plan import Plan, solve

POINTS = 16
_NOT_DATED = {"png": {"Software": None}, "svg": {"Date": None}}  # the same plan makes the same picture


def draw_plan(plan: Plan, path: Path) -> None:
    """Write a .png or .svg."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1)
    _draw_curve(plan, above)
    _draw_layers(plan, below)
    kind = path.suffix.removeprefix(".")
    figure.savefig(path, format=kind, dpi=120, metadata=_NOT_DATED[kind])


def curve(plan: Plan, points: int) -> list[Plan]:
    """The plans for budgets from the smallest size to where more bytes are of no use."""
    problem = plan.problem
    sizes = [sorted(option.stored_bytes for option in options) for options in problem.options]
    overhead = problem.overhead_bytes + plan.correction.more_bytes
    low, high = (overhead + sum(size[end] for size in sizes) for end in (0, -1))
    budgets = np.geomspace(low, high, points).round().astype(int).tolist()
    # Rounding may not take the first below what is possible.
    return [solve(problem, SizeBudget(max(low, budget)), plan.correction) for budget in budgets]


def _draw_curve(plan: Plan, axes: Axes) -> None:
    plans = curve(plan, POINTS)
    axes.plot([one.model_bytes / 1e6 for one in plans], [one.predicted_kl for one in plans], ".-", label="least loss")
    axes.plot([plan.model_bytes / 1e6], [plan.predicted_kl], "o", markersize=9, label=str(plan.budget))
    axes.set(xlabel="model files, MB", ylabel="predicted KL divergence, nats", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_layers(plan: Plan, axes: Axes) -> None:
    groups, schemes = plan.problem.groups, plan.schemes()
    bits = [8 * group.stored_bytes(schemes[group.layers[0]]) / group.weights for group in groups]
    kinds = [group.name.rpartition(".")[2] for group in groups]
    for kind in dict.fromkeys(kinds):
        places = [index for index, other in enumerate(kinds) if other == kind]
        axes.bar(places, [bits[index] for index in places], width=0.9, label=kind)
    axes.set(xlabel="group, in the order of the model", ylabel="stored bits a weight")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.legend(ncols=3, fontsize="small")
