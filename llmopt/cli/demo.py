"""`llmopt demo`: the whole way on the embedded model, offline."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt.cli.console import Console
from llmopt.cli.options import Force, Json, Quiet, Seed, Threads, folder, thread_count

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from llmopt.report.results import Report


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            parser=folder,
            help="Keep the artifacts there (default: throw them away).",
        ),
    ] = None,
    seed: Seed = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize the embedded model two ways, and show what changed. Needs no network and less than a minute.

    The model is a small Llama that this project trained on stories of its own grammar; the grammar's own perplexity,
    which no model can beat, stands below the table.
    """
    from llmopt.pipeline.demo import run_demo

    console = Console(json=json, quiet=quiet)
    report = run_demo(output, seed=seed or 0, threads=thread_count(threads), force=force, progress=console.progress)
    console.result(report.to_json(), lambda on: draw(report, output, on))


def draw(report: "Report", output: Path | None, on: "RichConsole") -> None:
    """What the model is, what was measured, and what to do next."""
    from llmopt.model.source import open_source
    from llmopt.report.render import print_report

    spec = open_source("demo").spec
    parameters = sum(tensor.count for tensor in spec.tensors())
    say = on.out
    say(f"demo: {spec.architecture}, {parameters / 1e6:.1f} million parameters, {len(spec.blocks)} blocks\n")
    print_report(report, on)
    say("\nthe same with your own model:")
    say("  llmopt quantize MODEL -o OUT --scheme w4a16")
    say("  llmopt bench OUT --baseline MODEL --text FILE --assert 'perplexity <= +5%'")
    kept = str(output / "w4a16") if output is not None else "OUT"
    say(f'  llmopt generate {shlex.quote(kept)} "In the morning"')
