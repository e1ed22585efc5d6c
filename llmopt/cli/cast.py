"""`llmopt cast`: a model in, one in 16 bits out that keeps in float32 what these cannot hold."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt.cli.console import Console
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
from llmopt.cli.outcome import resumable
from llmopt.cli.quantize import drawing

if TYPE_CHECKING:
    from llmopt.pipeline.cast import CastResult
    from llmopt.pipeline.cast_request import CastRequest


FORMATS = ("onnx", "hf")


def cast(
    model: Model,
    output: Output,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help="fp16 or bf16: what modules get that bear it.")
    ],
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="SHARE",
            help="Keep a module in float32 if 16 bits move what it gives by more, relative to its size. "
            "[default: 0.01]",
        ),
    ] = None,
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-fp32",
            metavar="PATTERN",
            help="Keep the modules whose name, or what stands behind any of its dots, matches: 'lm_head', "
            "'layers.0.*'. May be repeated.",
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            "--calib",
            metavar="TEXT",
            help="Text (.txt, .jsonl with the key text, or a dataset, NAME[:CONFIG[:SPLIT[:COLUMN]]], of the Hugging "
            "Face Hub or in a folder) whose activations are looked at. Default: stories that come with llmopt.",
        ),
    ] = None,
    calib_tokens: Annotated[
        int | None,
        typer.Option("--calib-tokens", min=1, metavar="N", help="Read at most so many of its tokens. [default: 4096]"),
    ] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="What to write: onnx, for onnxruntime and its genai (fp16 alone); hf, safetensors for transformers.",
        ),
    ] = "onnx",
    kernels: Annotated[
        str | None,
        typer.Option(
            "--kernels",
            metavar="HOW",
            help="With onnx, the pieces in which a prompt is read: measured, what is fastest on this machine; default, "
            "all at once, for other machines and the same bytes on all. [default: measured]",
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
    """Cast a model to 16 bits, but for what these cannot hold.

    What would overflow, underflow or lose too much stays float32. Ranges of weights and activations are scanned on
    text, block by block. Every module is listed with its dtype, and with the reason where it stays float32. What is
    written is then opened and held against the same in torch.

    Example: llmopt cast demo -o demo-fp16 --dtype fp16 --keep-fp32 lm_head
    """
    from llmopt.errors import UsageError
    from llmopt.precision.short import TOLERANCE, check_dtype, check_tolerance

    if format_ not in FORMATS:
        raise UsageError(f"there is no format {format_!r} to cast to", hint=f"--format {' or '.join(FORMATS)}")
    check_dtype(dtype)
    asked = TOLERANCE if tolerance is None else tolerance
    check_tolerance(asked)
    resuming = resume_choice(resume, restart)

    from llmopt.pipeline.cast_request import CastRequest

    request = CastRequest(
        model=model,
        output=output,
        dtype=dtype,
        tolerance=asked,
        keep_fp32=tuple(keep_fp32 or ()),
        calib=calib,
        calib_tokens=calib_tokens,
        revision=revision,
        trust_remote_code=trust_remote_code,
        format=format_,
        kernels=kernels,
        seed=seed or 0,
        threads=thread_count(threads),
        force=force,
        resume=resuming,
    )
    console = Console(json=json, quiet=quiet)
    if dry_run:
        show_plan(request, console)
    else:
        show_result(request, console)


def show_plan(request: "CastRequest", console: Console) -> None:
    """Say what would be done, which takes scanning the model."""
    from llmopt.artifact import check_destination
    from llmopt.pipeline.cast import cast_notes, plan_cast
    from llmopt.pipeline.cast_request import prepare_cast

    check_destination(request.output, force=request.force)
    prepared = prepare_cast(request, console.progress)
    prepared.require_room()
    plan = plan_cast(prepared, console.progress)
    needed, size_bytes = prepared.require_room(plan), prepared.bytes_of(plan)
    notes, layers = [*prepared.notes, *cast_notes(prepared, plan)], plan.layers()
    value = {
        "schema": "llmopt.cast-plan/1",
        "model": request.model,
        "output": str(request.output),
        "estimated_bytes": size_bytes,
        "estimate": needed.to_json(),
        "residual_from": plan.residual_from,
        "layers": [layer.to_json() for layer in layers],
        "notes": notes,
    }
    written = f"would write {request.output}: weights of {size_bytes / 1e6:,.1f} MB"
    lines = [*notes, written, f"{needed}; nothing was done"]
    console.result(value, drawing(layers, lines))


def show_result(request: "CastRequest", console: Console) -> None:
    """Do it, and say what came of it."""
    from llmopt.measure.memory import peak_rss_bytes
    from llmopt.pipeline.cast import cast as do_cast

    with resumable([request.output]):
        result = do_cast(request, console.progress)
    memory = {"predicted_bytes": result.needed.memory_bytes, "peak_bytes": peak_rss_bytes()}
    value = {"path": str(result.path)} | result.report.to_json() | {"memory": memory}
    console.result(value, drawing(result.plan.layers(), outcome_lines(result, request.model)))


def outcome_lines(result: "CastResult", model: str) -> list[str]:
    """The artifact in a few lines, and what to do with it and the model that it was made from."""
    size = result.report.candidates[0].metrics["size_bytes"]
    exact, shipped = result.verification.exact, result.verification.shipped
    assert size is not None
    assert shipped is not None
    path, source = shlex.quote(str(result.path)), shlex.quote(model)
    no_latency = " --no-latency" if result.manifest.format == "hf" else ""
    return [
        f"wrote {result.path}: {size.value / 1e6:,.1f} MB",
        f"the artifact against its weights in torch, on {exact.tokens} tokens:",
        f"  in float32: relative error {exact.relative_error:.1e}, top-1 agreement {exact.top1_agreement:.1%}",
        f"  as it ships: KL divergence {shipped.kl_divergence:.1e} nats, top-1 agreement {shipped.top1_agreement:.1%}",
        *result.report.notes,
        f"next: llmopt bench {path} --baseline {source}{no_latency}",
        f"      llmopt generate {path} PROMPT",
    ]
