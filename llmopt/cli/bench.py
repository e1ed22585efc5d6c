"""`llmopt bench`: what became better and what worse, with intervals, and promises as an exit code."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt.cli.console import Console
from llmopt.cli.options import Json, Quiet, Revision, Seed, Threads, thread_count
from llmopt.errors import ArtifactError, ExitCode

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from llmopt.report.results import Report


def bench(
    artifacts: Annotated[list[str], typer.Argument(metavar="ARTIFACT", help="Artifacts' folders, or models.")],
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="MODEL",
            help="What they are held against: the unquantized model, or another artifact (default: their source).",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="Text for accuracy: .txt, .jsonl, or a dataset, NAME[:CONFIG[:SPLIT[:COLUMN]]], of the Hugging "
            "Face Hub or in a folder. Default: built-in stories.",
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens",
            min=0,
            metavar="N",
            help="How much of the text to read, in tokens, spread evenly over it; 0 reads all of it.",
        ),
    ] = 8192,
    window: Annotated[
        int, typer.Option("--window", min=2, metavar="N", help="Tokens that the models see at once.")
    ] = 512,
    prompt: Annotated[
        int, typer.Option("--prompt", min=1, metavar="N", help="Tokens of the prompt whose latency is timed.")
    ] = 128,
    output: Annotated[
        int, typer.Option("--tokens-out", min=2, metavar="N", help="Tokens that are generated behind it.")
    ] = 32,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, metavar="N", help="Interleaved rounds of fresh processes.")
    ] = 6,
    accuracy: Annotated[bool, typer.Option("--accuracy/--no-accuracy", help="Measure accuracy.")] = True,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Measure latency and memory.")] = True,
    assertions: Annotated[
        list[str] | None,
        typer.Option(
            "--assert",
            metavar="EXPR",
            help="A promise: 'perplexity <= +1%' (against the baseline), 'tpot_ms <= 20', 'tpot_ms <= 0.8x', "
            "'size_bytes <= 150MB'. May be repeated.",
        ),
    ] = None,
    save: Annotated[
        bool,
        typer.Option(
            "--save/--no-save", help="Rewrite each artifact's report.json and README.md with what was measured."
        ),
    ] = True,
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write the table there.")] = None,
    revision: Revision = None,
    seed: Seed = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> ExitCode:
    """Measure accuracy, latency, memory and size against a baseline. All of it is paired, and has intervals.

    Accuracy: perplexity, KL divergence and top-1 agreement on the same tokens. Latency: TTFT is the time from a prompt
    to its first token, TPOT the time per token after that; both in interleaved rounds of fresh processes, with the
    baseline against itself beside each change. Each artifact's report.json and README.md are rewritten with what was
    measured, unless --no-save.

    Exit codes: 0 every promise is kept, 1 one is broken, 4 the intervals do not tell.

    Example: llmopt bench demo-int4 --baseline demo --assert 'perplexity <= +5%'
    """
    from llmopt.report.gates import exit_code, parse_gate

    gates = tuple(map(parse_gate, assertions or ()))

    from llmopt.measure.latency import LatencySettings
    from llmopt.pipeline.bench import BenchRequest, BenchSettings
    from llmopt.pipeline.bench import bench as do_bench

    if markdown is not None and not markdown.parent.is_dir():
        hint = f"mkdir -p {shlex.quote(str(markdown.parent))}"
        raise ArtifactError("the folder to write into does not exist", where=f"--markdown {markdown}", hint=hint)
    count = thread_count(threads)
    timing = LatencySettings(threads=count, prompt_tokens=prompt, output_tokens=output, rounds=rounds)
    settings = BenchSettings(
        text=text, tokens=tokens or None, window=window, accuracy=accuracy, latency=timing if latency else None
    )
    request = BenchRequest(
        candidates=tuple(artifacts),
        baseline=baseline,
        settings=settings,
        gates=gates,
        save=save,
        revision=revision,
        seed=seed or 0,
        threads=count,
    )
    console = Console(json=json, quiet=quiet)
    report = do_bench(request, console.progress)
    show_report(report, console, markdown)
    return exit_code(report.gates)


def show_report(report: "Report", console: Console, markdown: Path | None = None) -> None:
    """Print a report, and write it as Markdown where that was asked for."""
    from llmopt.artifact import write_text
    from llmopt.report.markdown import as_markdown
    from llmopt.report.render import print_report

    def draw(on: "RichConsole") -> None:
        print_report(report, on)

    if markdown is not None:
        write_text(markdown, as_markdown(report))
    console.result(report.to_json(), draw)
