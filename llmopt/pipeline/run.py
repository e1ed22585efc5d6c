"""A recipe, from its first step to its verdicts. A step whose artifact is there already, whole, is not done again."""

from dataclasses import dataclass, replace
from pathlib import Path

from llmopt.artifact import REPORT, load_manifest, write_json
from llmopt.errors import ArtifactError, ExitCode, UsageError
from llmopt.measure.latency import LatencySettings
from llmopt.pipeline.bench import BenchRequest, BenchSettings, bench
from llmopt.pipeline.bench_checks import check_lengths
from llmopt.pipeline.formats.onnx import ONNX
from llmopt.pipeline.prepare import Prepared, prepare
from llmopt.pipeline.quantize import execute
from llmopt.pipeline.request import QuantizeRequest
from llmopt.precision.budget import parse_budget
from llmopt.progress import Progress
from llmopt.quantize.scheme import parse_scheme
from llmopt.recipe import BenchStep, QuantizeStep, Recipe
from llmopt.report.gates import exit_code, judge, parse_gate
from llmopt.report.results import GateResult, Report


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What became of a recipe. `report` is None when it asks for no measurement."""

    artifacts: tuple[Path, ...]
    report: Report | None
    exit_code: ExitCode


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the command line adds to a recipe."""

    threads: int
    seed: int
    force: bool = False


def plan(recipe: Recipe, options: RunOptions, progress: Progress) -> list[Prepared]:
    """Every step, its model found and its layers assigned; nothing is written and no weight is read.

    Raises:
        LlmoptError: a step cannot be done.
    """
    require_benchable(recipe)
    prepared = [prepare(_request(recipe, step.quantize, options), progress) for step in recipe.steps]
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
    for step in prepared:
        if is_done(step, force=options.force):
            progress.say(f"{step.request.output} is there already, made from the same: kept")
        else:
            execute(step, progress)
    artifacts = tuple(step.request.output for step in prepared)
    if recipe.bench is None:
        return RunResult(artifacts=artifacts, report=None, exit_code=ExitCode.DONE)
    report = bench(_bench_request(recipe, artifacts, options), progress)
    gates = tuple(result for gate in recipe.gates for result in _judged(gate.expression, gate.candidate, report))
    report = replace(report, gates=gates)
    write_json(output / REPORT, report.to_json())
    return RunResult(artifacts=artifacts, report=report, exit_code=exit_code(gates))


def require_benchable(recipe: Recipe) -> None:
    """See that what is to be measured can be opened here.

    Raises:
        UsageError: a step writes a format that onnxruntime does not open.
    """
    other = next((step.quantize for step in recipe.steps if step.quantize.format != ONNX.name), None)
    if recipe.bench is not None and other is not None:
        raise UsageError(
            f"bench measures in onnxruntime, and step {other.name} has format {other.format}",
            hint=f"leave bench out, or write format {ONNX.name}",
        )


def is_done(step: Prepared, *, force: bool) -> bool:
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


def _request(recipe: Recipe, step: QuantizeStep, options: RunOptions) -> QuantizeRequest:
    return QuantizeRequest(
        model=recipe.model,
        output=Path(recipe.output) / step.name,
        scheme=parse_scheme(step.scheme),
        budget=None if step.budget is None else parse_budget(step.budget),
        method=step.method,
        minutes=step.minutes,
        calib=step.calib,
        calib_tokens=step.calib_tokens,
        overrides=tuple((pattern, parse_scheme(scheme)) for pattern, scheme in step.overrides.items()),
        ignore=step.ignore,
        format=step.format,
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
    return BenchSettings(text=asked.text, tokens=asked.tokens, window=asked.window, latency=latency)


def _judged(expression: str, candidate: str | None, report: Report) -> tuple[GateResult, ...]:
    results = judge(parse_gate(expression), report)
    return tuple(result for result in results if candidate is None or result.candidate == candidate)
