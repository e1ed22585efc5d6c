"""Artifacts against a baseline, on the same tokens and in the same minutes: deltas with intervals, and gates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from llmopt.artifact import load_manifest
from llmopt.calibrate.load import TO_MEASURE, load_text
from llmopt.calibrate.text import Corpus, built_in
from llmopt.calibrate.windows import TokenWindows, windows
from llmopt.measure.fidelity import compare
from llmopt.measure.host import describe_host, versions
from llmopt.measure.latency import LatencySettings, measure_latency
from llmopt.measure.outcome import Outcome
from llmopt.measure.size import compare_sizes
from llmopt.model.tokenizer import Tokenizer
from llmopt.pipeline.baseline import float_artifact, in_transformers, is_artifact, open_engine
from llmopt.pipeline.bench_checks import (
    check_engine,
    check_gates,
    check_lengths,
    check_names,
    check_saved,
    common_source,
    spec_of,
)
from llmopt.pipeline.kept import keep, kept_layers, kept_settings, lost_by
from llmopt.pipeline.oracle import oracle_note
from llmopt.progress import Progress
from llmopt.report.gates import Gate, judge
from llmopt.report.results import Candidate, Report, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What is measured. `text` None is the text that comes with llmopt; `latency` None measures accuracy alone.

    `tokens` None reads the whole text; fewer than it has are read at even distances.
    """

    text: str | Path | None = None
    tokens: int | None = 8192
    window: int = 512
    accuracy: bool = True
    latency: LatencySettings | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """Candidates, each an artifact's folder or a model, against a baseline, likewise (None: the candidates' source)."""

    candidates: tuple[str, ...]
    baseline: str | None
    settings: BenchSettings
    gates: tuple[Gate, ...] = ()
    save: bool = True  # each candidate's own report, in its folder
    revision: str | None = None
    seed: int = 0
    threads: int = 1


def bench(request: BenchRequest, progress: Progress) -> Report:
    """Measure, judge, and write each candidate's own report into its folder.

    Raises:
        LlmoptError: something does not open or is damaged, the text is too short, a window or prompt is too long, or
            models have different vocabularies.
    """
    check_names(request.candidates)
    check_gates(request.gates, request.settings)
    if request.save:
        check_saved(request.candidates)
    baseline_name = request.baseline or common_source(request.candidates)
    names = (baseline_name, *request.candidates)
    for name in names:
        check_engine(name, request.settings)
    for name in names:
        revision = request.revision if name == baseline_name else None
        check_lengths(name, spec_of(name, revision), request.settings)
    corpus = evaluation_text(request.settings, progress)
    baseline = float_artifact(baseline_name, revision=request.revision, threads=request.threads, progress=progress)
    paths = [
        float_artifact(name, revision=None, threads=request.threads, progress=progress) for name in request.candidates
    ]
    outcome = measure(request, corpus, baseline, paths, progress)
    report = assemble(request, baseline_name, baseline, paths, outcome)
    report = replace(report, gates=tuple(result for gate in request.gates for result in judge(gate, report)))
    # Sizes alone are not worth what a report says of accuracy and latency.
    if request.save and (request.settings.accuracy or request.settings.latency is not None):
        for name, path, candidate in zip(request.candidates, paths, report.candidates, strict=True):
            if is_artifact(name):
                save(path, candidate, report, progress)
    return report


def save(path: Path, candidate: Candidate, report: Report, progress: Progress) -> None:
    """Write an artifact's own part of a report into its folder, and say so where a larger measurement is lost."""
    own_gates = tuple(gate for gate in report.gates if gate.candidate == candidate.name)
    settings = {**kept_settings(path), **report.settings}
    if lost := lost_by(path, report):
        progress.say(f"{path}: its report held a larger measurement ({lost}), which is replaced")
        progress.say("llmopt bench --no-save measures and replaces nothing")
    keep(path, replace(report, candidates=(candidate,), gates=own_gates, settings=settings))


def measure(
    request: BenchRequest, corpus: Corpus | None, baseline: Path, paths: Sequence[Path], progress: Progress
) -> Outcome:
    """Sizes, then accuracy and latency as far as they are asked for."""
    settings = request.settings
    outcome = compare_sizes(baseline, paths)
    if corpus is not None:
        tokens = tokenized(corpus, settings, baseline)
        engines = [open_engine(path, request.threads) for path in (baseline, *paths)]
        outcome = outcome.with_outcome(compare(engines[0], engines[1:], tokens, request.seed, progress))
        note = oracle_note(tokens, settings, baseline)
        outcome = replace(outcome, notes=(*outcome.notes, *note))
        del engines  # the processes that measure latency need the memory
    if settings.latency is not None:
        outcome = outcome.with_outcome(
            measure_latency(baseline, paths, settings.latency, seed=request.seed, progress=progress)
        )
    return outcome


def evaluation_text(settings: BenchSettings, progress: Progress) -> Corpus | None:
    """What accuracy is measured on, if it is.

    Raises:
        LlmoptError: it is not there, or cannot be read.
    """
    if not settings.accuracy:
        return None
    return built_in() if settings.text is None else load_text(settings.text, TO_MEASURE, progress)


def tokenized(corpus: Corpus, settings: BenchSettings, folder: Path) -> TokenWindows:
    """The evaluation text in the baseline's tokens, read all through: intervals are as wide as documents are few."""
    return windows(corpus, Tokenizer.from_folder(folder), settings.window, settings.tokens, spread=True)


def assemble(
    request: BenchRequest, baseline_name: str, baseline: Path, paths: Sequence[Path], outcome: Outcome
) -> Report:
    """Everything in one report."""
    candidates = []
    for name, path, side in zip(request.candidates, paths, outcome.candidates, strict=True):
        manifest = load_manifest(path)
        candidates.append(
            Candidate(
                name=Path(name).resolve().name if is_artifact(name) else name,
                path=name,
                engine=engine_of(path),
                scheme=manifest.scheme,
                method=manifest.method,
                metrics=side.metrics,
                deltas=side.deltas,
                extra=side.extra,
                layers=kept_layers(path),
            )
        )
    own = outcome.baseline
    return Report(
        host=describe_host(request.threads),
        versions=versions(),
        seed=request.seed,
        baseline=Subject(
            name=f"baseline {Path(baseline_name).name}",
            engine=engine_of(baseline),
            metrics=own.metrics,
            extra=own.extra,
        ),
        candidates=tuple(candidates),
        # How several were made is in the report of each.
        settings={**(kept_settings(paths[0]) if len(paths) == 1 else {}), **outcome.settings},
        notes=outcome.notes,
    )


def engine_of(path: Path) -> str:
    """The program that opens an artifact, and its version."""
    program = "transformers" if in_transformers(load_manifest(path)) else "onnxruntime"
    return f"{program} {metadata.version(program)}"
