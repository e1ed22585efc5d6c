"""A plan for a model on a cluster, from what people ask for to plan.json. Only the model's config is read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmopt.artifact import check_destination, write_text
from llmopt.errors import ArtifactError, UsageError, near_match
from llmopt.model.source import ModelSource
from llmopt.model.spec import ModelSpec
from llmopt.partition.cluster import load_cluster, uncounted
from llmopt.partition.cost import DTYPE_BYTES, Precision
from llmopt.partition.engines import ENGINES, export
from llmopt.partition.joint import choose_schemes
from llmopt.partition.plan import Plan, Workload, write_plan
from llmopt.partition.promises import parse_promise
from llmopt.partition.search import Search
from llmopt.partition.timeline import as_svg
from llmopt.partition.wanted import OBJECTIVES, Model, Wanted
from llmopt.pipeline.stored import Schemes, open_model, stored_schemes
from llmopt.progress import Progress
from llmopt.quantize.assign import assign
from llmopt.quantize.scheme import parse_scheme

DRAWN = ".svg"  # what timelines are
ONNX = "onnx"  # beside the engines that a plan is told to in words


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionRequest:
    """What to plan, and for what. None: whatever is best."""

    model: str
    cluster: Path
    output: Path
    objective: str = "tpot"
    promises: tuple[str, ...] = ()
    prompt: int = 512
    output_tokens: int = 128
    batch: int = 1
    dtype: str | None = None
    scheme: str | None = None
    joint: bool = False
    degree: int | None = None
    micro_batches: int | None = None
    replicas: int | None = None
    split: str | None = None
    order: str | None = None
    timeline: Path | None = None
    export: str | None = None
    export_to: Path | None = None
    revision: str | None = None
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionResult:
    """The plan, and what another engine is to be told."""

    plan: Plan
    exported: dict[str, Any] | None


def partition(request: PartitionRequest, progress: Progress) -> PartitionResult:
    """Find the plan and write it.

    Raises:
        LlmoptError: the request contradicts itself, the model or the cluster, or there is no such plan.
    """
    for path in (request.output, request.timeline):
        if path is not None and not path.parent.is_dir():
            raise ArtifactError("there is no folder to write into", where=str(path.parent), hint="make it first")
        if path is not None and path.is_dir():
            raise ArtifactError("a folder is there, where a file is to be", where=str(path), hint="name a file")
    if request.timeline is not None and request.timeline.suffix.lower() != DRAWN:
        what = f"{request.timeline.name} is to be a picture of another kind than {DRAWN}"
        raise UsageError(what, where="--timeline", hint=f"--timeline {request.timeline.stem}{DRAWN}")
    if request.output.exists() and not request.force:
        raise ArtifactError("something is there already", where=str(request.output), hint="--force replaces it")
    result = find_plan(request, progress)
    write_plan(request.output, result.plan)
    if request.timeline is not None:
        write_text(request.timeline, as_svg(result.plan))
    return result


def find_plan(request: PartitionRequest, progress: Progress) -> PartitionResult:
    """Find the plan, and write nothing but the graphs that an export asks for.

    Raises:
        LlmoptError: the request contradicts itself, the model or the cluster, or there is no such plan.
    """
    wanted = _wanted(request)
    cluster = load_cluster(request.cluster)
    weights = request.export == ONNX
    source = open_model(request.model, revision=request.revision, weights=weights, progress=progress)
    workload = Workload(prompt=request.prompt, output=request.output_tokens, batch=request.batch)
    _require_context(source.spec, workload)
    stored = stored_schemes(source)
    precision = _precision(source.spec, request, stored)
    if request.joint:
        precision = choose_schemes(source.spec, cluster, workload, precision)
    model = Model(
        name=source.name,
        spec=source.spec,
        precision=precision,
        revision=source.revision,
        stored=stored is not None,
    )
    with progress.task("searching for the plan"):
        plan = Search(model=model, cluster=cluster, workload=workload, wanted=wanted).plan()
    plan = replace(plan, notes=(*plan.notes, *uncounted(cluster)))
    if request.joint:
        plan = replace(plan, notes=(*plan.notes, "schemes chosen for the least estimated loss that fits"))
    return PartitionResult(plan=plan, exported=_exported(plan, source, request, progress))


def _exported(plan: Plan, source: ModelSource, request: PartitionRequest, progress: Progress) -> dict[str, Any] | None:
    if request.export is None:
        return None
    if request.export_to is None:
        return export(plan, source.spec, request.export, stored=source.quantization is not None)
    from llmopt.pipeline.stages import write_stages  # noqa: PLC0415 (torch and onnx, which plans need not wait for)

    return write_stages(plan, source, request.export_to, progress, force=request.force).to_json()


def _wanted(request: PartitionRequest) -> Wanted:
    named = {name: name for name in OBJECTIVES}
    if request.objective not in named:
        hint = near_match(request.objective, OBJECTIVES)
        raise UsageError(f"there is no objective {request.objective!r}", where="--objective", hint=hint)
    if request.export is not None and request.export not in (*ENGINES, ONNX):
        hint = near_match(request.export, (*ENGINES, ONNX))
        raise UsageError(f"there is no engine {request.export!r}", where="--export", hint=hint)
    if (request.export == ONNX) != (request.export_to is not None):
        what = f"--export {ONNX} writes graphs, and --export-to names their folder: neither is without the other"
        raise UsageError(what, where="--export, --export-to")
    if request.export_to is not None:
        check_destination(request.export_to, force=request.force)
    return Wanted(
        objective=named[request.objective],
        promises=tuple(map(parse_promise, request.promises)),
        micro_batches=request.micro_batches,
        replicas=request.replicas,
        degree=request.degree,
        order=None if request.order is None else tuple(name.strip() for name in request.order.split(",")),
        split=None if request.split is None else _counts(request.split),
    )


def _counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"{text!r} is no split", where="--split", hint="blocks of each stage: --split 10,12,8")
    return tuple(int(part) for part in parts)


def _require_context(spec: ModelSpec, workload: Workload) -> None:
    if workload.context > spec.context_length:
        what = f"{workload.context} tokens, where the model reads {spec.context_length}"
        raise UsageError(what, where="--prompt, --output-tokens", hint="their sum is the context that is needed")


def _precision(spec: ModelSpec, request: PartitionRequest, stored: Schemes | None) -> Precision:
    dtype = request.dtype or spec.dtype
    if dtype not in DTYPE_BYTES:
        raise UsageError(f"there is no dtype {dtype!r}", where="--dtype", hint=near_match(dtype, DTYPE_BYTES))
    if stored is not None:
        if request.scheme is not None or request.joint:
            what = "the model is quantized already, and keeps the schemes that it has"
            raise UsageError(what, where="--scheme, --joint", hint="leave them out, or give the model it was made from")
        return Precision(dtype=dtype, schemes=stored)
    if request.scheme is None:
        return Precision(dtype=dtype, schemes={})
    if request.joint:
        raise UsageError("--joint chooses the schemes, and --scheme gives one", hint="leave one of them out")
    found = assign(spec, parse_scheme(request.scheme))
    return Precision(dtype=dtype, schemes={name: one.scheme for name, one in found.items() if one.scheme is not None})
