"""A recipe, from its first step to its verdicts. A step whose artifact is there already, whole, is not done again."""

from dataclasses import dataclass, replace
from pathlib import Path

from llmopt.artifact import REPORT, load_manifest, write_json
from llmopt.errors import ArtifactError, ExitCode, UsageError
from llmopt.measure.latency import LatencySettings
from llmopt.pipeline.bench import BenchRequest, BenchSettings, bench
from llmopt.pipeline.bench_checks import check_lengths
from llmopt.pipeline.cast import execute_cast
from llmopt.pipeline.cast_request import CastRequest, PreparedCast, prepare_cast
from llmopt.pipeline.formats.onnx import ONNX
from llmopt.pipeline.prepare import Prepared, prepare
from llmopt.pipeline.qat.options import QatOptions
from llmopt.pipeline.quantize import execute
from llmopt.pipeline.request import QuantizeRequest
from llmopt.pipeline.run_plans import MadePlan, judge_plans, make_plan, plan_requests, plans_as_json
from llmopt.precision.budget import parse_budget
from llmopt.progress import Progress
from llmopt.quantize.scheme import parse_scheme
from llmopt.recipe import BenchStep, CastStep, PartitionStep, QuantizeStep, Recipe, Step
from llmopt.report.gates import exit_code, judge, parse_gate
from llmopt.report.results import GateResult, Report


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What became of a recipe. `report` is None when it asks for no measurement; `gates` are all that were judged."""

    artifacts: tuple[Path, ...]
    report: Report | None
    exit_code: ExitCode
    plans: tuple[MadePlan, ...] = ()
    gates: tuple[GateResult, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the command line adds to a recipe."""

    threads: int
    seed: int
    force: bool = False


def plan(recipe: Recipe, options: RunOptions, progress: Progress) -> list[Prepared | PreparedCast]:
    """Every step that makes an artifact, its layers assigned; nothing is written and no weight is read.

    Raises:
        LlmoptError: a step cannot be done.
    """
    require_benchable(recipe)
    plan_requests(recipe)
    prepared = [_prepared(recipe, step, options, progress) for step in recipe.steps if step.partition is None]
    if recipe.bench is not None:
        settings = _bench_settings(recipe.bench, options)
        check_lengths(recipe.model, prepared[0].source.spec, settings)
    return prepared


def run(recipe: Recipe, options: RunOptions, progress: Progress) -> RunResult:
    """Do all that the recipe says.

    Raises:
        LlmoptError: a step cannot be done; those before it keep what they wrote, and a second run goes on from there.
    """
    prepared = plan(recipe, options, progress)
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    # Plans take seconds: what cannot be is found before hours of work.
    plans = tuple(
        make_plan(name, request, progress, force=options.force) for name, request in plan_requests(recipe).items()
    )
    for step in prepared:
        if is_done(step, force=options.force):
            progress.say(f"{step.request.output} is there already, made from the same: kept")
        else:
            _execute(step, progress)
    artifacts = tuple(step.request.output for step in prepared)
    gates = judge_plans(recipe, plans)
    if recipe.bench is None:
        code = exit_code(gates)
        return RunResult(artifacts=artifacts, report=None, exit_code=code, plans=plans, gates=gates)
    report = bench(_bench_request(recipe, artifacts, options), progress)
    measured = tuple(result for gate in recipe.gates for result in _judged(gate.expression, gate.candidate, report))
    gates = (*measured, *gates)
    report = replace(report, gates=gates)
    if plans:
        note = f"predicted and not measured: what gates say of {', '.join(made.name for made in plans)}"
        settings = {**report.settings, "plans": plans_as_json(plans)}
        report = replace(report, settings=settings, notes=(*report.notes, note))
    write_json(output / REPORT, report.to_json())
    return RunResult(artifacts=artifacts, report=report, exit_code=exit_code(gates), plans=plans, gates=gates)


def require_benchable(recipe: Recipe) -> None:
    """See that what is to be measured can be opened here.

    Raises:
        UsageError: a step writes a format that onnxruntime does not open, nor transformers as it ships.
    """
    if recipe.bench is None:
        return
    works = [(step, step.work) for step in recipe.steps if not isinstance(step.work, PartitionStep)]
    if not works:
        raise UsageError("bench measures artifacts, and no step makes one", hint="leave bench out")
    for step, work in works:
        if work.format == ONNX.name or (step.cast is not None and not recipe.bench.latency):
            continue
        alone = "" if step.cast is None else ", or measure accuracy alone: `latency: false`"
        raise UsageError(
            f"bench measures in onnxruntime, and step {work.name} has format {work.format}",
            hint=f"leave bench out, or write format {ONNX.name}{alone}",
        )


def is_done(step: Prepared | PreparedCast, *, force: bool) -> bool:
    """Whether the step's artifact is there, whole, and made from the same by the same.

    Raises:
        ArtifactError: something else stands there, and `force` was not given.
    """
    output = step.request.output
    if not output.exists():
        return False
    try:
        found, wanted = load_manifest(output, verify=True), step.manifest()
    except ArtifactError:
        if not force:
            raise
        return False
    if found.key == wanted.key:
        return True
    if force:
        return False
    what = f"an artifact stands where this step writes, and was made from something else: {found.differs(wanted)}"
    raise ArtifactError(what, where=str(output), hint="--force replaces it")


def _prepared(recipe: Recipe, step: Step, options: RunOptions, progress: Progress) -> Prepared | PreparedCast:
    if step.cast is not None:
        return prepare_cast(_cast_request(recipe, step.cast, options), progress)
    assert step.quantize is not None
    return prepare(_request(recipe, step.quantize, options), progress)


def _execute(step: Prepared | PreparedCast, progress: Progress) -> None:
    if isinstance(step, PreparedCast):
        execute_cast(step, progress)
    else:
        execute(step, progress)


def _cast_request(recipe: Recipe, step: CastStep, options: RunOptions) -> CastRequest:
    return CastRequest(
        model=recipe.model,
        output=Path(recipe.output) / step.name,
        dtype=step.dtype,
        tolerance=step.tolerance,
        keep_fp32=step.keep_fp32,
        calib=step.calib,
        calib_tokens=step.calib_tokens,
        format=step.format,
        kernels=step.kernels,
        seed=options.seed,
        threads=options.threads,
        force=options.force,
    )


def _request(recipe: Recipe, step: QuantizeStep, options: RunOptions) -> QuantizeRequest:
    return QuantizeRequest(
        model=recipe.model,
        output=Path(recipe.output) / step.name,
        scheme=parse_scheme(step.scheme),
        budget=None if step.budget is None else parse_budget(step.budget),
        method=step.method,
        minutes=step.minutes,
        training=None if step.training is None else QatOptions(**step.training.model_dump()),
        calib=step.calib,
        calib_tokens=step.calib_tokens,
        overrides=tuple((pattern, parse_scheme(scheme)) for pattern, scheme in step.overrides.items()),
        ignore=step.ignore,
        format=step.format,
        cast=step.cast,
        kernels=step.kernels,
        seed=options.seed,
        threads=options.threads,
        force=options.force,
    )


def _bench_request(recipe: Recipe, artifacts: tuple[Path, ...], options: RunOptions) -> BenchRequest:
    assert recipe.bench is not None
    return BenchRequest(
        candidates=tuple(map(str, artifacts)),
        baseline=recipe.model,
        settings=_bench_settings(recipe.bench, options),
        seed=options.seed,
        threads=options.threads,
    )


def _bench_settings(asked: BenchStep, options: RunOptions) -> BenchSettings:
    latency = LatencySettings(
        threads=options.threads, prompt_tokens=asked.prompt, output_tokens=asked.output, rounds=asked.rounds
    )
    return BenchSettings(
        text=asked.text, tokens=asked.tokens, window=asked.window, latency=latency if asked.latency else None
    )


def _judged(expression: str, candidate: str | None, report: Report) -> tuple[GateResult, ...]:
    results = judge(parse_gate(expression), report)
    return tuple(result for result in results if candidate is None or result.candidate == candidate)
