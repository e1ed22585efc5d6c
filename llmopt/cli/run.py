"""`llmopt run`: a recipe from its first step to its verdicts, for CI."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt.cli.bench import show_report
from llmopt.cli.console import Console
from llmopt.cli.options import DryRun, Force, Json, Quiet, Seed, Settings, Threads, thread_count
from llmopt.cli.outcome import resumable
from llmopt.errors import ExitCode

if TYPE_CHECKING:
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
    """Do what a recipe says: quantize, measure, and judge its gates.

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
    """The report, or where the artifacts are."""
    if result.report is not None:
        show_report(result.report, console)
        return
    paths = [str(path) for path in result.artifacts]
    console.result({"artifacts": paths}, "\n".join(f"wrote {path}" for path in paths))
