"""`llmopt quantize`: a model in, a quantized artifact out, checked against what it should compute."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt.cli.console import Console
from llmopt.cli.mixed import GROUP_COLUMNS, Shown, plan_line
from llmopt.cli.options import (
    DryRun,
    Force,
    Json,
    Model,
    Output,
    Quiet,
    Restart,
    ResumeFlag,
    Revision,
    Seed,
    Threads,
    TrustRemoteCode,
    resume_choice,
    thread_count,
)
from llmopt.cli.outcome import explain as explained
from llmopt.cli.outcome import resumable
from llmopt.cli.processes import require_one_process
from llmopt.cli.training import (
    Batch,
    ByBlock,
    CrossEntropy,
    LoraRank,
    Precision,
    Rate,
    Shard,
    Steps,
    TrainData,
    training_options,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import Console as RichConsole

    from llmopt.pipeline.prepare import Prepared
    from llmopt.pipeline.quantize import QuantizeResult
    from llmopt.pipeline.request import QuantizeRequest
    from llmopt.quantize.assign import Override
    from llmopt.report.results import LayerResult

FORMATS = ("onnx", "hf", "gptq")


def quantize(
    model: Model,
    output: Output,
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            metavar="SCHEME",
            help="w8a16, w4a16, w2a16 or w8a8; behind the first three -g32, -g64, -g128 or -channel, and -sym or "
            "-asym: w4a16-g128-sym.",
        ),
    ] = "w8a16",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="BUDGET",
            help="Choose each layer's scheme so that the least is lost within a size of the model files (92MB) or a "
            "number of bits a weight (4.5bits), or so that the size is the least within a loss ('+2% perplexity'). "
            "Layers that --override or --ignore name keep what these say.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="How the numbers are found: rtn, rounding to nearest; search, with ranges that suit the inputs; gptq, "
            "with later columns making up for the errors of earlier ones; reconstruct, the same and then whole blocks "
            "learn from the float ones; auto, for each layer and block what measures best of these, on text that is "
            "held out. Before it may stand awq or smoothquant, which scale inputs against weights, or rotate, which "
            "mixes channels of the residual stream and of heads: awq+gptq. Behind it qat: what it made is trained to "
            "be what the float model is, reconstruct+qat; by itself that follows gptq.",
        ),
    ] = "rtn",
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            metavar="N",
            help="With --method auto or qat: quantize, and train, in so many minutes; verifying comes behind. With "
            "auto all layers get what is quick; as there is time for it, gptq and then learning go to blocks spread "
            "over the model. Another run may give another artifact. Default: everything for all, --steps, and the same "
            "artifact each time.",
        ),
    ] = None,
    train_data: TrainData = None,
    steps: Steps = None,
    batch: Batch = None,
    cross_entropy: CrossEntropy = None,
    lora_rank: LoraRank = None,
    by_block: ByBlock = False,
    precision: Precision = None,
    rate: Rate = None,
    shard: Shard = None,
    calib: Annotated[
        str | None,
        typer.Option(
            "--calib",
            metavar="TEXT",
            help="Text (.txt, .jsonl with the key text, or a dataset, NAME[:CONFIG[:SPLIT[:COLUMN]]], of the Hugging "
            "Face Hub or in a folder) for --budget and for methods that look at inputs: like what the model will read. "
            "Default: stories that come with llmopt.",
        ),
    ] = None,
    calib_tokens: Annotated[
        int | None,
        typer.Option("--calib-tokens", min=1, metavar="N", help="Read at most so many of its tokens. [default: 32768]"),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="PATTERN=SCHEME",
            help="Another scheme for the layers whose name, or what stands behind any of its dots, matches: "
            "'lm_head=w8a16', 'layers.0.*=w8a16'. May be repeated: the last one that matches counts.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="PATTERN",
            help="Leave layers that match, in the same way, as they are, whatever --override says. May be repeated.",
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Show what each step takes of memory; and with --budget what each group of layers got, and the next "
            "best.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="With --budget: draw predicted loss against size, .png or .svg."),
    ] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="What to write: onnx, for onnxruntime and its genai; hf, compressed-tensors for transformers; "
            "gptq, the checkpoints that GPTQModel reads, and vLLM too.",
        ),
    ] = "onnx",
    cast: Annotated[
        str | None,
        typer.Option(
            "--cast",
            metavar="DTYPE",
            help="With --format hf: fp16 or bf16 for what is not quantized, but for what that cannot hold. "
            "[default: the model's dtype]",
        ),
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(
            "--kernels",
            metavar="HOW",
            help="How onnxruntime's kernels are chosen: measured, what is fastest on this machine; default, what is "
            "fast on most, for an artifact that runs elsewhere. [default: measured, for --format onnx]",
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = None,
    threads: Threads = None,
    resume: ResumeFlag = False,
    restart: Restart = False,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model, and check what was written.

    Every linear and embedding gets the scheme or is named with the reason why not. What is written is then
    opened and held against the quantized model in torch; if they differ, nothing is left behind.

    A method that looks at inputs keeps its finished parts in a journal beside the output until that is whole: after a
    Ctrl-C, a crash or a full disk the same command goes on where it stopped, to the same bytes. Several
    processes divide its work among them: torchrun --nproc-per-node 2 -m llmopt quantize …

    Example: llmopt quantize demo -o demo-int4 --scheme w4a16 --override lm_head=w8a16
    """
    from llmopt.errors import UsageError
    from llmopt.precision.budget import parse_budget
    from llmopt.quantize.registry import check_method, check_minutes
    from llmopt.quantize.scheme import parse_scheme

    if format_ not in FORMATS:
        raise UsageError(f"there is no format {format_!r}", hint=f"--format {' or '.join(FORMATS)}")
    parsed = parse_scheme(scheme)
    overrides = tuple(map(parse_override, override or ()))
    check_method(method)
    check_minutes(minutes, method)
    resuming = resume_choice(resume, restart)
    asked = None if budget is None else parse_budget(budget)
    shown = Shown(explain=explain, plot=plot)
    shown.check(has_budget=asked is not None)

    from llmopt.pipeline.request import QuantizeRequest

    training = training_options(train_data, steps, batch, cross_entropy, lora_rank, by_block, precision, rate, shard)
    request = QuantizeRequest(
        model=model,
        output=output,
        scheme=parsed,
        budget=asked,
        method=method,
        minutes=minutes,
        training=training,
        calib=calib,
        calib_tokens=calib_tokens,
        overrides=overrides,
        ignore=tuple(ignore or ()),
        revision=revision,
        trust_remote_code=trust_remote_code,
        format=format_,
        cast=cast,
        kernels=kernels,
        seed=seed or 0,
        threads=thread_count(threads),
        force=force,
        resume=resuming,
    )
    console = Console(json=json, quiet=quiet)
    if dry_run:
        require_one_process("--dry-run")
        show_plan(request, console, shown)
    else:
        show_result(request, console, shown)


def parse_override(text: str) -> "Override":
    """`PATTERN=SCHEME` as its two halves."""
    from llmopt.errors import UsageError
    from llmopt.quantize.scheme import parse_scheme

    pattern, equals, scheme = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--override {text!r} has no PATTERN=SCHEME", hint="--override 'lm_head=w8a16'")
    return pattern, parse_scheme(scheme)


def show_plan(request: "QuantizeRequest", console: Console, shown: Shown) -> None:
    """Say what would be done."""
    from llmopt.artifact import check_destination
    from llmopt.pipeline.prepare import prepare, with_plan
    from llmopt.precision.explain import explain, plan_json

    check_destination(request.output, force=request.force)
    prepared = with_plan(prepare(request, console.progress), console.progress)
    needed, layers = prepared.require_room(), planned_layers(prepared)
    value = {
        "schema": "llmopt.quantize-plan/1",
        "model": request.model,
        "output": str(request.output),
        "estimated_bytes": prepared.estimated_bytes,
        "estimate": needed.to_json(),
        "layers": [layer.to_json() for layer in layers],
        "notes": list(prepared.notes),
    }
    lines = [
        *prepared.notes,
        *shown.memory(needed),
        f"would write {request.output}: weights of {prepared.estimated_bytes / 1e6:,.1f} MB",
        f"{needed}; nothing was done",
    ]
    if prepared.plan is not None:
        value["budget"] = plan_json(prepared.plan, explain(prepared.plan))
        lines = [plan_line(prepared.plan), *lines]
        shown.draw(prepared.plan)
    console.result(value, drawing(layers, lines, shown.table(prepared.plan)))


def planned_layers(prepared: "Prepared") -> tuple["LayerResult", ...]:
    """Each layer with what it is to get."""
    from llmopt.report.results import LayerResult

    return tuple(
        LayerResult(
            name=item.name,
            scheme=None if item.scheme is None else item.scheme.name,
            method=None if item.scheme is None else prepared.method_of(item.name),
            reason=item.reason,
        )
        for item in prepared.assignments.values()
    )


def show_result(request: "QuantizeRequest", console: Console, shown: Shown) -> None:
    """Do it, and say what came of it."""
    from llmopt.measure.memory import peak_rss_bytes
    from llmopt.pipeline.quantize import quantize as do_quantize
    from llmopt.pipeline.ranks import joined

    with joined(explained) as ranks, resumable([request.output]):
        result = do_quantize(request, console.progress, ranks)
    peak_bytes = peak_rss_bytes()
    memory = {"predicted_bytes": result.needed.memory_bytes, "peak_bytes": peak_bytes}
    value = {"path": str(result.path)} | result.report.to_json() | {"memory": memory}
    if result.plan is not None:
        shown.draw(result.plan)
    layers = result.report.candidates[0].layers
    lines = [*shown.memory(result.needed, peak_bytes), *outcome_lines(result, request.model)]
    console.result(value, drawing(layers, lines, shown.table(result.plan)))


def outcome_lines(result: "QuantizeResult", model: str) -> list[str]:
    """The artifact in a few lines, and what to do with it and the model that it was made from."""
    size = result.report.candidates[0].metrics["size_bytes"]
    assert size is not None
    exact = result.verification.exact
    fitted = "calibration" in result.report.settings
    return [
        *(["relative errors are those of weights: fitting to inputs raises them, to lower those of outputs"] * fitted),
        f"wrote {result.path}: {size.value / 1e6:,.1f} MB",
        f"the artifact against the quantized model in torch, on {exact.tokens} tokens:",
        f"  in float32: relative error {exact.relative_error:.1e}, top-1 agreement {exact.top1_agreement:.1%}",
        shipped_line(result),
        *result.report.notes,
        *next_steps(result, model),
    ]


def shipped_line(result: "QuantizeResult") -> str:
    """What its own engine makes of the artifact."""
    shipped = result.verification.shipped
    if shipped is None:
        return "  as it ships: not run here, for that takes the engine that it is for"
    return (
        f"  as it ships: KL divergence {shipped.kl_divergence:.1e} nats, top-1 agreement {shipped.top1_agreement:.1%}"
    )


def next_steps(result: "QuantizeResult", model: str) -> list[str]:
    """What opens the artifact."""
    path = shlex.quote(str(result.path))
    if result.manifest.format == "hf":
        return [f"next: transformers.AutoModelForCausalLM.from_pretrained({str(result.path)!r})"]
    if result.manifest.format == "gptq":
        return [f"next: vllm serve {path}", f"      gptqmodel.GPTQModel.load({str(result.path)!r})"]
    return [f"next: llmopt bench {path} --baseline {shlex.quote(model)}", f"      llmopt generate {path} PROMPT"]


def drawing(
    layers: "Iterable[LayerResult]", lines: "Sequence[str]", groups: "Sequence[Sequence[str]]" = ()
) -> "Callable[[RichConsole], None]":
    """The layers, then what became of each group of them and why, if that was asked for, and lines under them."""

    def draw(console: "RichConsole") -> None:
        from llmopt.report.render import print_layers, print_table

        print_layers(layers, console)
        if groups:
            console.print()
            print_table(GROUP_COLUMNS, groups, console)
        for line in ("", *lines):
            console.print(line, markup=False, highlight=False)

    return draw
