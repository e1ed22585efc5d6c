"""`llmopt partition`: the parallel plan for a model on a cluster, from the model's config alone."""

import shlex
from json import dumps as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmopt.cli.console import Console
from llmopt.cli.options import Force, Json, Model, Quiet, Revision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console as RichConsole
    from rich.table import Table

    from llmopt.partition.plan import Plan, Predicted


def partition(
    model: Model,
    cluster: Annotated[
        Path, typer.Option("--cluster", metavar="FILE", help="Devices and links, as probe writes them.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PLAN", help="The plan to write, as JSON.")],
    objective: Annotated[
        str, typer.Option("--objective", metavar="NAME", help="ttft, tpot, throughput, devices or price.")
    ] = "tpot",
    slo: Annotated[list[str] | None, typer.Option("--slo", metavar="EXPR", help="A promise: 'ttft_ms<=300'.")] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, metavar="N", help="Tokens of a prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=1, metavar="N", help="Tokens behind it.")] = 128,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Sequences at once.")] = 1,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="NAME", help="What it computes in (default: the config's).")
    ] = None,
    scheme: Annotated[
        str | None, typer.Option("--scheme", metavar="NAME", help="Plan for it quantized: w8a16, w4a16, w8a8.")
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Choose each block's scheme as well: the least loss that fits.")
    ] = False,
    tp: Annotated[
        int | None, typer.Option("--tp", min=1, metavar="N", help="Only this tensor-parallel degree.")
    ] = None,
    micro_batches: Annotated[
        int | None, typer.Option("--micro-batches", min=1, metavar="N", help="Only so many micro-batches.")
    ] = None,
    replicas: Annotated[int | None, typer.Option("--replicas", min=1, metavar="N", help="Only so many copies.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="A,B,…", help="Price stages of so many blocks instead.")
    ] = None,
    order: Annotated[
        str | None, typer.Option("--order", metavar="D,E,…", help="Devices in this order, and no others.")
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option("--timeline", metavar="FILE.svg", help="Draw when each stage computes.")
    ] = None,
    export: Annotated[
        str | None,
        typer.Option(
            "--export",
            metavar="ENGINE",
            help="Say it to vllm, sglang or accelerate as well, or write it as onnx graphs.",
        ),
    ] = None,
    export_to: Annotated[
        Path | None, typer.Option("--export-to", metavar="FOLDER", help="Where onnx graphs go, one for each stage.")
    ] = None,
    revision: Revision = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Plan which device has which blocks, and predict the times.

    Prints the plan, beside it an even split and a single device, and how far from the best it can be at most.

    Example: llmopt partition demo --cluster cluster.yaml -o plan.json
    """
    from llmopt.pipeline.partition import PartitionRequest
    from llmopt.pipeline.partition import partition as do_partition

    console = Console(json=json, quiet=quiet)
    result = do_partition(
        PartitionRequest(
            model=model,
            cluster=cluster,
            output=output,
            objective=objective,
            promises=tuple(slo or ()),
            prompt=prompt,
            output_tokens=output_tokens,
            batch=batch,
            dtype=dtype,
            scheme=scheme,
            joint=joint,
            degree=tp,
            micro_batches=micro_batches,
            replicas=replicas,
            split=split,
            order=order,
            timeline=timeline,
            export=export,
            export_to=export_to,
            revision=revision,
            force=force,
        ),
        console.progress,
    )
    value = result.plan.to_json() | ({"export": result.exported} if result.exported else {})
    console.result(value, lambda on: draw(result.plan, result.exported, on))


def draw(plan: "Plan", exported: "Mapping[str, Any] | None", on: "RichConsole") -> None:
    """Stages, comparison, timeline, and how good it is."""
    from llmopt.partition.finish import TOLD
    from llmopt.partition.timeline import as_text

    on.print(_stages(plan))
    on.print()
    on.print(_comparison(plan))
    on.print(f"\n{as_text(plan)}\n", markup=False, highlight=False)
    if plan.gap is not None:
        proven = "nothing is better" if plan.gap < TOLD else f"at most {100 * plan.gap:.2g} % above the best"
        on.print(f"{plan.objective}: {plan.value:.4g}; {proven}", highlight=False)
    for note in (*plan.notes, *([f"not used: {', '.join(plan.unused)}"] if plan.unused else [])):
        on.print(note, markup=False, highlight=False)
    if exported:
        on.out(f"\n{said(exported)}", highlight=False)


def said(exported: "Mapping[str, Any]") -> str:
    """What another engine is told, to be pasted where it is told it."""
    if "command" in exported:
        return shlex.join(
            [*(f"{name}={value}" for name, value in exported["environment"].items()), *exported["command"]]
        )
    if "device_map" in exported:
        return "device_map = " + json_text(exported["device_map"], indent=4)
    files = [f"  {stage['file']}: blocks {stage['layers'][0]}–{stage['layers'][1]}" for stage in exported["stages"]]
    return "\n".join([f"written to {exported['folder']}, relative error {exported['relative_error']:.1e}", *files])


def _stages(plan: "Plan") -> "Table":
    table = _table("stage", "blocks", "weights MB", "cache MB", "activations MB", "prefill ms", "decode ms")
    for number, stage in enumerate(plan.stages):
        degree = f" (tensor parallel, {stage.tp})" if stage.tp > 1 else ""
        sizes = (stage.weight_bytes, stage.kv_bytes, stage.activation_bytes)
        table.add_row(
            f"{number} {stage.devices[0]}{degree}",
            f"{stage.layers[0]}–{stage.layers[1]}{' + head' if stage.lm_head else ''}",
            *(f"{size / 1e6:,.1f}" for size in sizes),
            f"{stage.prefill_ms:.4g}",
            f"{stage.decode_ms:.4g}",
        )
    return table


def _comparison(plan: "Plan") -> "Table":
    table = _table("", "TTFT ms", "TPOT ms", "tokens/s")
    copies = f", {plan.replicas} replicas" if plan.replicas > 1 else ""
    _compare(table, f"this plan, micro-batches: {plan.micro_batches}{copies}", plan.predicted)
    one = len(plan.unused) + plan.ranks == 1
    for name, predicted in plan.baselines.items():
        _compare(table, name.replace("_", " "), predicted, otherwise="is the same" if one else "does not fit")
    return table


def _compare(table: "Table", name: str, predicted: "Predicted | None", otherwise: str = "") -> None:
    if predicted is None:
        table.add_row(name, otherwise, "", "")
        return
    times = (predicted.ttft_ms, predicted.tpot_ms, predicted.throughput_tokens_per_s)
    table.add_row(name, *(f"{value:.4g}" for value in times))


def _table(first: str, *others: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(first, box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in others:
        table.add_column(name, justify="right")
    return table
