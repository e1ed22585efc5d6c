"""`llmopt run`: a recipe from its first step to its verdicts, for CI."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt.cli.bench import show_report
from llmopt.cli.console import Console
from llmopt.cli.options import DryRun, Force, Json, Quiet, Seed, Settings, Threads, thread_count
from llmopt.cli.outcome import resumable
from llmopt.errors import ExitCode
from llmopt.words import counted

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from llmopt.partition.plan import Plan
    from llmopt.pipeline.cast_request import PreparedCast
    from llmopt.pipeline.prepare import Prepared
    from llmopt.pipeline.run import RunResult


def run(
    file: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.")],
    settings: Settings = None,
    seed: Seed = None,
    threads: Threads = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> ExitCode:
    """Do what a recipe says: quantize, plan, measure, judge.

    A step whose artifact is there already, whole and made from the same, is not done again. The report of all steps is
    written to report.json in the recipe's output folder.

    Exit codes: 0 every gate passes, 1 one fails, 4 the intervals do not tell.

    Example: llmopt run recipes/ci-gate.yaml --set output=/tmp/out
    """
    from llmopt.cli.vocabulary import vocabulary
    from llmopt.recipe import load_recipe

    recipe = load_recipe(file, vocabulary=vocabulary(), assignments=settings or ())

    from llmopt.pipeline.run import RunOptions, plan
    from llmopt.pipeline.run import run as do_run

    options = RunOptions(
        threads=thread_count(threads, recipe.threads), seed=recipe.seed if seed is None else seed, force=force
    )
    console = Console(json=json, quiet=quiet)
    if dry_run:
        steps = plan(recipe, options, console.progress)
        value = {str(step.request.output): {"estimated_bytes": step.estimated_bytes} for step in steps}
        lines = [planned_line(step, force=force) for step in steps]
        plans = [step.partition.name for step in recipe.steps if step.partition is not None]
        lines += [f"would write {Path(recipe.output) / name}: a plan" for name in plans]
        console.result({"schema": "llmopt.run-plan/1", "artifacts": value}, "\n".join([*lines, "nothing was done"]))
        return ExitCode.DONE
    with resumable(Path(recipe.output) / step.work.name for step in recipe.steps):
        result = do_run(recipe, options, console.progress)
    show_run(result, console)
    return result.exit_code


def planned_line(step: "Prepared | PreparedCast", *, force: bool) -> str:
    """What would become of a step."""
    from llmopt.pipeline.run import is_done

    path = step.request.output
    if is_done(step, force=force):
        return f"{path} is there already, made from the same"
    needed = step.require_room()
    return f"would write {path}: {step.estimated_bytes / 1e6:,.1f} MB; {needed}"


def show_run(result: "RunResult", console: Console) -> None:
    """The report, or where the artifacts are; plans, and what was said of them."""
    from llmopt.pipeline.run_plans import plans_as_json
    from llmopt.report.render import print_table
    from llmopt.report.rows import gate_rows

    lines = [f"wrote {path}" for path in result.artifacts] if result.report is None else []
    lines += [f"wrote {made.path}: {predicted_line(made.plan)}" for made in result.plans]
    if result.report is not None:
        for line in lines:
            console.progress.say(line)
        show_report(result.report, console)
        return
    value: dict[str, object] = {"artifacts": [str(path) for path in result.artifacts]}
    if result.plans:
        value |= {"plans": plans_as_json(result.plans), "gates": [gate.to_json() for gate in result.gates]}

    def draw(on: "RichConsole") -> None:
        on.out("\n".join(lines), highlight=False)
        if result.gates:
            on.print()
            print_table(("verdict", "gate", "plan", "predicted"), [row[:4] for row in gate_rows(result.gates)], on)

    console.result(value, draw)


def predicted_line(plan: "Plan") -> str:
    """What a plan promises, in a line."""
    predicted = plan.predicted
    times = f"TTFT {predicted.ttft_ms:.4g} ms, TPOT {predicted.tpot_ms:.4g} ms"
    return f"{counted(len(plan.stages), 'stage')}, {times}, {predicted.throughput_tokens_per_s:.4g} tokens/s"
