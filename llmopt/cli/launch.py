"""`llmopt launch`: run a plan, check what it says, and hold what was predicted against what was measured."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from llmopt.cli.console import Console
from llmopt.cli.options import Force, Json, Quiet, Seed
from llmopt.errors import ArtifactError, LlmoptError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.table import Table

    from llmopt.pipeline.launching.result import Compared, LaunchResult


def launch(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="What llmopt partition wrote.")],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="What to continue (default: random tokens, as many as planned)."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hold tokens and logits against those of a single process.")
    ] = False,
    materialize: Annotated[
        Path | None,
        typer.Option(
            "--materialize",
            metavar="FOLDER",
            help="Write each rank's weights there as a file of its own, unless they are there, and run from those.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate", metavar="FILE", help="Write the plan's cluster there, its speeds set right by this run."
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, metavar="N", help="Measured generations, behind one that is not.")
    ] = 3,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=1.0, metavar="SECONDS", help="End if a rank gets nowhere for as long."),
    ] = 60.0,
    pin: Annotated[
        bool, typer.Option("--pin/--no-pin", help="Give each rank on this machine cores of its own.")
    ] = True,
    seed: Seed = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a plan, check what it says, and measure it.

    Starts all ranks on this machine, or, under torchrun, is one of them. Prints what was generated, and of every stage
    the predicted and the measured time and memory, and its traffic. A rank that dies or hangs ends the run, by its
    name.

    Example: llmopt launch plan.json --verify
    """
    if calibrate is not None and calibrate.exists() and not force:
        raise ArtifactError("the cluster file exists already", where=str(calibrate), hint="--force replaces it")
    from llmopt.pipeline.launching.launch import LaunchRequest
    from llmopt.pipeline.launching.launch import launch as do_launch

    console = Console(json=json, quiet=quiet)
    request = LaunchRequest(
        plan=plan,
        prompt=prompt,
        verify=verify,
        materialize=materialize,
        rounds=rounds,
        timeout_s=timeout,
        pinned=pin,
        seed=seed or 0,
    )
    result = do_launch(request, console.progress, _fail)
    if result is not None:
        found = result
        if calibrate is not None:
            _write_calibrated(plan, found, calibrate)
        console.result(result.to_json(), lambda on: draw(found, on))


def _write_calibrated(plan: Path, result: "LaunchResult", path: Path) -> None:
    from llmopt.partition.plan import read_plan
    from llmopt.pipeline.launching.calibrate import calibrated
    from llmopt.pipeline.probing.cluster_file import write_cluster

    write_cluster(calibrated(read_plan(plan), result), path, f"# Speeds as measured by llmopt launch {plan.name}.\n")


def draw(result: "LaunchResult", on: "RichConsole") -> None:
    """The text, the table, and the verdict."""
    said = result.texts or [" ".join(map(str, row)) for row in result.tokens]
    for text in dict.fromkeys(said):
        on.print(text, markup=False, highlight=False)
    on.print()
    on.print(_table(result))
    if result.verified is not None:
        found = result.verified
        tokens = (
            "the tokens of a single process" if found.tokens_equal else "rounding apart, what a single process says"
        )
        on.print(f"\nverified: {tokens}, logits within {found.largest_difference:.1g}", highlight=False)


def _table(result: "LaunchResult") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("stage", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("blocks", "prefill ms", "decode ms", "memory MB", "sent, prefill", "sent, token"):
        table.add_column(name, justify="right")
    for number, stage in enumerate(result.stages):
        table.add_row(
            f"{number} {', '.join(stage.devices)}",
            f"{stage.layers[0]}–{stage.layers[1]}",
            _compared(stage.prefill_ms),
            _compared(stage.decode_ms),
            _compared(stage.memory_bytes, 1e-6),
            f"{stage.prefill_sent_bytes:,} B",
            f"{stage.decode_sent_bytes:,} B",
        )
    table.add_row("all: TTFT, TPOT", "", _compared(result.ttft_ms), _compared(result.tpot_ms), "", "", "", style="bold")
    return table


def _compared(numbers: "Compared", factor: float = 1.0) -> str:
    """Such as `12.1 → 11.8 (+3 %)`: predicted, measured, and the error of the prediction."""
    if numbers.measured is None:
        return "—"
    measured = f"{numbers.measured * factor:.4g}"
    if numbers.predicted is None or numbers.error is None:
        return measured
    return f"{numbers.predicted * factor:.4g} → {measured} ({100 * numbers.error:+.0f} %)"


def _fail(error: LlmoptError) -> NoReturn:
    from rich.text import Text

    from llmopt.cli.progress import stderr_console

    stderr_console().print(Text.assemble(("error:", "bold red"), " ", str(error)), soft_wrap=True)
    os._exit(error.exit_code)
