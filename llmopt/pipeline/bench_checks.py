"""What is wrong with a bench, as far as it can be told before anything is exported or measured."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.artifact import load_manifest
from llmopt.errors import ArtifactError, UsageError
from llmopt.model.families import spec_from_config
from llmopt.model.json_file import read_object
from llmopt.model.rotary import longest_sequence
from llmopt.model.source import CONFIG, DEMO, open_source
from llmopt.model.spec import ModelSpec
from llmopt.pipeline.baseline import in_transformers, is_artifact, require_onnx
from llmopt.report.gates import Gate
from llmopt.report.results import METRICS, TIMING_METRICS

if TYPE_CHECKING:
    from llmopt.pipeline.bench import BenchSettings

ACCURACY_METRICS = frozenset(METRICS) - TIMING_METRICS - {"size_bytes"}


def check_names(candidates: Sequence[str]) -> None:
    """Gates and notes name a candidate by its folder's last name, so two may not share one.

    Raises:
        UsageError: two do.
    """
    names = [Path(name).resolve().name for name in candidates]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two candidates are called {repeated!r}", hint="rename one of the folders")


def check_saved(candidates: Sequence[str]) -> None:
    """What is measured goes into each artifact's folder, which others may have made.

    Raises:
        ArtifactError: one cannot be written to.
    """
    for name in candidates:
        if is_artifact(name) and not os.access(name, os.W_OK | os.X_OK):
            what = "the artifact's folder cannot be written to, and its report is to be replaced by what is measured"
            raise ArtifactError(what, where=name, hint="--no-save writes nothing into it")


def common_source(candidates: Sequence[str]) -> str:
    """The model that all candidates were made from, where it can be found by the name in their manifests.

    Raises:
        UsageError: it has to be named.
    """
    hint = "name it: --baseline MODEL"
    for name in candidates:
        if not Path(name).exists() and name != DEMO:
            raise UsageError("there is no such folder", where=name, hint=f"a model of the Hub needs a baseline: {hint}")
        if not is_artifact(name):
            raise UsageError(f"{name} is no artifact, so the baseline is not known", hint=hint)
    names = {load_manifest(Path(name)).source.name for name in candidates}
    if len(names) > 1:
        raise UsageError(f"the candidates come from different models: {', '.join(sorted(names))}", hint=hint)
    (name,) = names
    if name != DEMO and "/" not in name:
        raise UsageError(f"the candidates were made from a local model, {name!r}, that is not here", hint=hint)
    return name


def check_gates(gates: Sequence[Gate], settings: "BenchSettings") -> None:
    """A promise about what is not measured could never be kept.

    Raises:
        UsageError: there is one.
    """
    for gate in gates:
        if settings.latency is None and gate.metric in TIMING_METRICS:
            raise UsageError("latency and memory are not measured", where=gate.expr, hint="leave --no-latency out")
        if not settings.accuracy and gate.metric in ACCURACY_METRICS:
            raise UsageError("accuracy is not measured", where=gate.expr, hint="leave --no-accuracy out")


def check_engine(name: str, settings: "BenchSettings") -> None:
    """Measurements are taken in onnxruntime; accuracy of cast checkpoints in transformers.

    Raises:
        LlmoptError: these do not open an artifact or do not measure what is asked for, or its manifest is damaged.
    """
    if not is_artifact(name):
        return
    manifest = load_manifest(Path(name))
    if not in_transformers(manifest):
        require_onnx(manifest, name)
    elif settings.latency is not None:
        raise UsageError(
            f"{name} is opened in transformers, whose latency says nothing beside that of onnxruntime",
            hint="--no-latency",
        )


def check_lengths(name: str, spec: ModelSpec, settings: "BenchSettings") -> None:
    """No model reads more than its context.

    Raises:
        UsageError: it would have to.
    """
    longest = longest_sequence(spec)
    if settings.accuracy and settings.window > longest:
        raise _too_long(name, longest, f"windows of {settings.window} tokens", f"--window {longest}")
    if settings.latency is not None:
        prompt, output = settings.latency.prompt_tokens, settings.latency.output_tokens
        if prompt + output > longest:
            what = f"a prompt of {prompt} tokens and {output} behind it"
            raise _too_long(name, longest, what, "smaller --prompt and --tokens-out")


def spec_of(name: str, revision: str | None) -> ModelSpec:
    """What an artifact or a model is, by its config alone.

    Raises:
        LlmoptError: it is not there, or not supported.
    """
    if is_artifact(name):
        path = Path(name) / CONFIG
        return spec_from_config(read_object(path), where=str(path))
    return open_source(name, revision=revision, weights=False).spec


def _too_long(name: str, longest: int, what: str, hint: str) -> UsageError:
    return UsageError(f"{what}, and the model reads {longest}", where=name, hint=hint)
