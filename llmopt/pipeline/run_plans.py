"""The steps of a recipe that plan: plan.json and a picture for each, and gates about what is predicted."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmopt.errors import ArtifactError, RecipeError, UsageError
from llmopt.partition.plan import Plan, read_plan, write_plan
from llmopt.partition.promises import parse_promise
from llmopt.partition.timeline import as_svg
from llmopt.pipeline.partition import PartitionRequest, find_plan
from llmopt.progress import Progress
from llmopt.recipe import PartitionStep, Recipe
from llmopt.report.gates import OPERATORS, parse_gate
from llmopt.report.results import GateResult

PLAN, TIMELINE = "plan.json", "timeline.svg"
PREDICTED = ("ttft_ms", "tpot_ms")  # what a gate can be about


@dataclass(frozen=True, slots=True, kw_only=True)
class MadePlan:
    """A step's plan, and where it stands."""

    name: str
    path: Path
    plan: Plan


def plan_requests(recipe: Recipe) -> dict[str, PartitionRequest]:
    """What each step asks for, by its name.

    Raises:
        RecipeError: a promise cannot be read, or a gate is about what a plan does not predict.
    """
    steps = [step.partition for step in recipe.steps if step.partition is not None]
    for gate in recipe.gates:
        if gate.candidate in {step.name for step in steps}:
            _require_predicted(gate.expression)
    return {step.name: _request(recipe, step) for step in steps}


def _request(recipe: Recipe, step: PartitionStep) -> PartitionRequest:
    for promise in step.slo:
        try:
            parse_promise(promise)
        except UsageError as error:
            raise RecipeError(error.what, where=f"step {step.name}: slo", hint=error.hint) from error
    return PartitionRequest(
        model=recipe.model,
        cluster=Path(step.cluster),
        output=Path(recipe.output) / step.name / PLAN,
        objective=step.objective,
        promises=step.slo,
        prompt=step.prompt,
        output_tokens=step.output,
        batch=step.batch,
        dtype=step.dtype,
        scheme=step.scheme,
        joint=step.joint,
        degree=step.tp,
        micro_batches=step.micro_batches,
        replicas=step.replicas,
    )


def _require_predicted(expression: str) -> None:
    gate = parse_gate(expression)
    if gate.metric not in PREDICTED or gate.against != "value":
        hint = f"write {' or '.join(f'{name} <= 20' for name in PREDICTED)}; slo promises throughput as well"
        raise RecipeError("a plan does not predict that", where=expression, hint=hint)


def make_plan(name: str, request: PartitionRequest, progress: Progress, *, force: bool) -> MadePlan:
    """Find a step's plan and write it. One that is there already, and is the same, is kept.

    Raises:
        ArtifactError: another plan is there, or something else, and `force` was not given.
    """
    found = find_plan(request, progress).plan
    path = request.output
    if path.exists() and not force:
        if read_plan(path) != found:
            what = "a plan stands where this step writes, and was made from something else"
            raise ArtifactError(what, where=str(path), hint="--force replaces it")
        progress.say(f"{path} is there already, made from the same: kept")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_plan(path, found)
        (path.parent / TIMELINE).write_text(as_svg(found), encoding="utf-8")
    return MadePlan(name=name, path=path, plan=found)


def judge_plans(recipe: Recipe, plans: tuple[MadePlan, ...]) -> tuple[GateResult, ...]:
    """Gates about plans: a prediction is a number without an interval, kept or not."""
    named = {made.name: made.plan for made in plans}
    results = []
    for asked in recipe.gates:
        if asked.candidate not in named:
            continue
        gate = parse_gate(asked.expression)
        value: float = getattr(named[asked.candidate].predicted, gate.metric)
        results.append(
            GateResult(
                expr=gate.expr,
                verdict="pass" if OPERATORS[gate.operator](value, gate.bound) else "fail",
                value=value,
                low=None,
                high=None,
                candidate=asked.candidate,
            )
        )
    return tuple(results)


def plans_as_json(plans: tuple[MadePlan, ...]) -> dict[str, Any]:
    """What a report says of plans: where they stand, what was minimized, and what is predicted."""
    return {
        made.name: {
            "path": str(made.path),
            "objective": made.plan.objective,
            "value": made.plan.value,
            "gap": made.plan.gap,
            "predicted": asdict(made.plan.predicted),
        }
        for made in plans
    }
