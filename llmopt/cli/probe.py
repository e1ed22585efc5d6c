"""`llmopt probe`: measure this machine into a cluster file."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt.cli.console import Console
from llmopt.cli.options import Force, Json, Quiet
from llmopt.errors import ArtifactError

if TYPE_CHECKING:
    from rich.table import Table

    from llmopt.pipeline.probing.probe import Probe


def probe(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The cluster file to write.")],
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks", min=1, metavar="N", help="Divide the machine into so many (default: its GPUs, else its cores)."
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine for a cluster file.

    Memory; products and the rest of a block at several sizes; what a rank keeps of its speed while all others work, and
    what it takes longer where it has waited; messages and sums between ranks. Takes a minute and a half.

    Example: llmopt probe -o cluster.yaml
    """
    if output.exists() and not force:
        raise ArtifactError("the cluster file exists already", where=str(output), hint="--force replaces it")
    if not output.parent.is_dir():
        hint = f"mkdir -p {shlex.quote(str(output.parent))}"
        raise ArtifactError("the folder to write into does not exist", where=str(output.parent), hint=hint)
    from llmopt.partition.cluster import to_json
    from llmopt.pipeline.probing.cluster_file import cluster, write_cluster
    from llmopt.pipeline.probing.probe import ProbeRequest
    from llmopt.pipeline.probing.probe import probe as do_probe

    console = Console(json=json, quiet=quiet)
    found = do_probe(ProbeRequest(ranks=ranks), console.progress)
    written = cluster(found)
    write_cluster(written, output)
    console.result(to_json(written), _table(found))


def _table(found: "Probe") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    device = found.device
    table = Table(f"{found.ranks} × {device.name}", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", justify="right")
    for kind, speed in device.compute.speeds.items():
        table.add_row(f"{kind}, many tokens", f"{1e3 * speed.tflops:.4g} GFLOP/s")
        table.add_row(f"{kind}, weights for one token", f"{speed.gb_per_s:.4g} GB/s")
        table.add_row(f"{kind}, calls", f"{speed.call_us:.4g} µs a product")
    rest = device.compute.rest
    table.add_row("a block's own", f"{1e6 * rest.launch_s:.4g} µs")
    table.add_row("attention", f"{1e3 * rest.attention.tflops:.4g} GFLOP/s, {rest.attention.gb_per_s:.4g} GB/s")
    kept = device.kept
    table.add_row("kept beside others: many tokens, one", f"{100 * kept.many:.3g} %, {100 * kept.one:.3g} %")
    table.add_row("waking for a token", f"{1e6 * kept.waking_s:.4g} µs")
    table.add_row("memory of a rank", f"{device.memory_bytes / 1e9:.4g} GB")
    for name, link in (("messages", found.messages), ("sums", found.sums)):
        if link is not None:
            table.add_row(name, f"{1e6 * link.latency_s:.4g} µs + {link.bytes_per_s / 1e9:.4g} GB/s")
    return table
