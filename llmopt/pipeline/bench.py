"""Artifacts against a baseline, on the same tokens and in the same minutes: deltas with intervals, and gates."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmopt.artifact import MODEL_CARD, REPORT, Manifest, load_manifest, write_json
from llmopt.calibrate.text import Corpus, built_in, load_documents
from llmopt.calibrate.windows import TokenWindows, windows
from llmopt.engine.ort import OrtEngine
from llmopt.errors import UsageError
from llmopt.export.card import Card, card_text
from llmopt.measure.fidelity import compare
from llmopt.measure.host import describe_host, versions
from llmopt.measure.latency import LatencySettings, measure_latency
from llmopt.measure.outcome import Outcome
from llmopt.measure.size import compare_sizes
from llmopt.model.source import CONFIG
from llmopt.model.tokenizer import Tokenizer
from llmopt.pipeline.baseline import float_artifact, is_artifact
from llmopt.pipeline.oracle import oracle_note
from llmopt.progress import Progress
from llmopt.report.gates import Gate, judge
from llmopt.report.results import Candidate, LayerResult, Report, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What is measured. `text` None is the text that comes with llmopt; `latency` None measures accuracy alone.

    `tokens` None reads the whole text; fewer than it has are read at even distances.
    """

    text: Path | None = None
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
    revision: str | None = None
    seed: int = 0
    threads: int = 1


def bench(request: BenchRequest, progress: Progress) -> Report:
    """Measure, judge, and write each candidate's own report into its folder.

    Raises:
        LlmoptError: something does not open, the text is too short, or models have different vocabularies.
    """
    check_names(request.candidates)
    baseline_name = request.baseline or common_source(request.candidates)
    baseline = float_artifact(baseline_name, revision=request.revision, threads=request.threads, progress=progress)
    paths = [
        float_artifact(name, revision=None, threads=request.threads, progress=progress) for name in request.candidates
    ]
    outcome = measure(request, baseline, paths, progress)
    report = assemble(request, baseline_name, baseline, paths, outcome)
    report = replace(report, gates=tuple(result for gate in request.gates for result in judge(gate, report)))
    for name, path, candidate in zip(request.candidates, paths, report.candidates, strict=True):
        if is_artifact(name):
            own_gates = tuple(gate for gate in report.gates if gate.candidate == candidate.name)
            settings = {**kept_settings(path), **report.settings}
            keep(path, replace(report, candidates=(candidate,), gates=own_gates, settings=settings))
    return report


def check_names(candidates: Sequence[str]) -> None:
    """Gates and notes name a candidate by its folder's last name, so two may not share one.

    Raises:
        UsageError: two do.
    """
    names = [Path(name).resolve().name for name in candidates]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two candidates are called {repeated!r}", hint="rename one of the folders")


def common_source(candidates: Sequence[str]) -> str:
    """The model that all candidates were made from, where it can be found by the name in their manifests.

    Raises:
        UsageError: it has to be named.
    """
    hint = "name it: --baseline MODEL"
    for name in candidates:
        if not is_artifact(name):
            raise UsageError(f"{name} is no artifact, so the baseline is not known", hint=hint)
    names = {load_manifest(Path(name)).source.name for name in candidates}
    if len(names) > 1:
        raise UsageError(f"the candidates come from different models: {', '.join(sorted(names))}", hint=hint)
    (name,) = names
    if name != "demo" and "/" not in name:
        raise UsageError(f"the candidates were made from a local model, {name!r}, that is not here", hint=hint)
    return name


def measure(request: BenchRequest, baseline: Path, paths: Sequence[Path], progress: Progress) -> Outcome:
    """Sizes, then accuracy and latency as far as they are asked for."""
    settings = request.settings
    outcome = compare_sizes(baseline, paths)
    if settings.accuracy:
        tokens = read_text(settings, baseline)
        engines = [OrtEngine(path, request.threads) for path in (baseline, *paths)]
        outcome = outcome.with_outcome(compare(engines[0], engines[1:], tokens, request.seed, progress))
        note = oracle_note(tokens, settings, baseline)
        outcome = replace(outcome, notes=(*outcome.notes, *note))
        del engines  # the processes that measure latency need the memory
    if settings.latency is not None:
        outcome = outcome.with_outcome(
            measure_latency(baseline, paths, settings.latency, seed=request.seed, progress=progress)
        )
    return outcome


def read_text(settings: BenchSettings, folder: Path) -> TokenWindows:
    """The evaluation text in the baseline's tokens, read all through: intervals are as wide as documents are few."""
    corpus: Corpus = built_in() if settings.text is None else load_documents(settings.text)
    return windows(corpus, Tokenizer.from_folder(folder), settings.window, settings.tokens, spread=True)


def assemble(
    request: BenchRequest, baseline_name: str, baseline: Path, paths: Sequence[Path], outcome: Outcome
) -> Report:
    """Everything in one report."""
    engine = f"onnxruntime {versions()['onnxruntime']}"
    candidates = []
    for name, path, side in zip(request.candidates, paths, outcome.candidates, strict=True):
        manifest = load_manifest(path)
        candidates.append(
            Candidate(
                name=Path(name).resolve().name if is_artifact(name) else name,
                path=name,
                engine=engine,
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
            name=f"baseline {Path(baseline_name).name}", engine=engine, metrics=own.metrics, extra=own.extra
        ),
        candidates=tuple(candidates),
        # How several were made is in the report of each.
        settings={**(kept_settings(paths[0]) if len(paths) == 1 else {}), **outcome.settings},
        notes=outcome.notes,
    )


def keep(folder: Path, report: Report) -> None:
    """Write an artifact's own report, and its model card anew with what was measured."""
    manifest: Manifest = load_manifest(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    card = card_text(Card.of(manifest, config, report))
    write_json(folder / REPORT, report.to_json())
    partial = folder / f".{MODEL_CARD}.partial"
    partial.write_text(card, encoding="utf-8", newline="\n")
    partial.replace(folder / MODEL_CARD)


def kept_layers(folder: Path) -> tuple[LayerResult, ...]:
    """What the report of an artifact says of its layers; nothing for a baseline."""
    candidates = _kept(folder).get("candidates") or [{}]
    return tuple(LayerResult(**layer) for layer in candidates[0].get("layers", ()))


def kept_settings(path: Path) -> dict[str, Any]:
    """What the report of an artifact says of its making: what it was calibrated on, how well the export agreed."""
    settings = _kept(path).get("settings", {})
    return {name: settings[name] for name in ("calibration", "verification") if name in settings}


def _kept(folder: Path) -> Mapping[str, Any]:
    path = folder / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
