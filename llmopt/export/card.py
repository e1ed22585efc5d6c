"""The model card, `README.md`: front matter for the Hub, what was measured, and how to run and to make it again.

Timings are left out: they belong to the machine in `report.json`, and the card of two equal runs must be the same.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from llmopt.artifact import Manifest
from llmopt.calibrate.text import BUILT_IN_CALIBRATION
from llmopt.engine.ort import GENAI_CONFIG
from llmopt.export.opening import GENAI, OPENING
from llmopt.report.markdown import code, comparison_table, escape, layer_table
from llmopt.report.results import METRICS, TIMING_METRICS, Report
from llmopt.words import counted

TIMELESS = frozenset(METRICS) - TIMING_METRICS

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BITS = re.compile(r"w(\d+)a\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card is written from. `report` holds this artifact as its only candidate; `genai`: whether that opens it.

    `license` is the base model's, as its own card names it; None when that is not known here.
    """

    manifest: Manifest
    architecture: str | None
    genai: bool
    report: Report
    license: str | None = None

    @classmethod
    def of(cls, manifest: Manifest, config: Mapping[str, Any], report: Report, *, license: str | None = None) -> "Card":  # noqa: A002
        """From an artifact's manifest, its Hugging Face config and its report."""
        assert len(report.candidates) == 1, "a card shows one artifact"
        names = config.get("architectures") or [None]
        return cls(
            manifest=manifest,
            architecture=names[0],
            genai=GENAI_CONFIG in manifest.files,
            report=report,
            license=license,
        )


def card_text(card: Card) -> str:
    """The whole file."""
    (candidate,) = card.report.candidates
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True)}---",
        f"# {escape(_title(card.manifest))}",
        _introduction(card),
        "## Measured",
        _measured(card),
        "## Run it",
        OPENING[card.manifest.format].run,
        *([GENAI] if card.genai else []),
        "## Make it again",
        f"```sh\n{_command(card.manifest)}\n```",
    ]
    if candidate.layers:
        parts += ["## Layers", layer_table(candidate.layers)]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> dict[str, Any]:
    """Keys that the Hub reads. Without `base_model_relation` it may list a quantized model among finetunes."""
    manifest = card.manifest
    bits = _BITS.match(manifest.scheme or "")
    known = {
        "license": card.license,
        "base_model": manifest.source.name if _HUB_ID.fullmatch(manifest.source.name) else None,
        "base_model_relation": "quantized" if _HUB_ID.fullmatch(manifest.source.name) else None,
        "library_name": _library(card),
        "pipeline_tag": "text-generation",
        "tags": [
            OPENING[manifest.format].tag,
            "quantized",
            *([f"int{bits[1]}"] if bits else []),
            "llmopt",
        ],
    }
    return {key: value for key, value in known.items() if value is not None}


def _library(card: Card) -> str:
    return "onnxruntime-genai" if card.genai else OPENING[card.manifest.format].library


def _title(manifest: Manifest) -> str:
    name = manifest.source.name.rsplit("/", maxsplit=1)[-1]
    return f"{name} {manifest.scheme}" if manifest.scheme else name


def _introduction(card: Card) -> str:
    manifest = card.manifest
    budget = f", chosen within {code(manifest.budget)}," if manifest.budget else ""
    scheme = (
        f" with scheme {code(manifest.scheme)}{budget} by method {code(manifest.method or '')}"
        if manifest.scheme
        else ""
    )
    revision = f" at revision {code(manifest.source.revision)}" if manifest.source.revision else ""
    architecture = f" ({code(card.architecture)})" if card.architecture else ""
    written = OPENING[manifest.format].written
    return (
        f"{escape(manifest.source.name)}{architecture}{revision}, quantized{scheme} and written as {written}. "
        f"The weights that it was made from have the fingerprint {code(manifest.source.fingerprint)}."
        f"{_calibration(manifest)}{_basis(card.report)}"
    )


def _calibration(manifest: Manifest) -> str:
    read = manifest.calibration
    if read is None:
        return ""
    text, sha256 = escape(str(read["text"])), code(str(read["sha256"]))
    return f" It was fitted to at most {read['tokens']} tokens of {text}, whose SHA-256 is {sha256}."


def _basis(report: Report) -> str:
    basis = report.settings.get("basis")
    return "" if basis is None or basis["seed"] is None else " Its residual stream is in a rotated basis."


def _measured(card: Card) -> str:
    """The table, with names that are the same wherever the artifact was written, and what it was measured on."""
    report = card.report
    renamed = replace(
        report,
        baseline=replace(report.baseline, name="baseline") if report.baseline else None,
        candidates=tuple(replace(candidate, name="this model") for candidate in report.candidates),
    )
    text = report.settings.get("fidelity")
    if text is None:
        return f"{comparison_table(renamed, TIMELESS)}\n\nAccuracy was not measured."
    return (
        f"{comparison_table(renamed, TIMELESS)}\n\nOn {escape(text['text'])}: {counted(text['tokens'], 'token')} of "
        f"{escape(counted(text['clusters'], text['clustered_by']))}. Both models read the same tokens; the "
        "intervals come from a bootstrap over them, and the change is paired. The baseline's own KL divergence "
        "and agreement are those against itself in another batch arrangement: the noise of the measurement."
    )


def _command(manifest: Manifest) -> str:
    """The command that writes this artifact; the shell reads nothing in it that came from outside."""
    words = ["llmopt", "quantize", manifest.source.name, "-o", "OUT", "--format", manifest.format]
    if manifest.source.revision:
        words += ["--revision", manifest.source.revision]
    if manifest.scheme:
        how = ["--scheme", manifest.scheme] if manifest.budget is None else ["--budget", manifest.budget]
        words += [*how, "--method", manifest.method or "rtn"]
    if manifest.minutes is not None:
        words += ["--minutes", f"{manifest.minutes:g}"]
    if manifest.calibration is not None:
        if manifest.calibration["text"] != BUILT_IN_CALIBRATION:
            words += ["--calib", str(manifest.calibration["text"])]
        words += ["--calib-tokens", str(manifest.calibration["tokens"])]
    for pattern, scheme in manifest.overrides.items():
        words += ["--override", f"{pattern}={scheme}"]
    for pattern in manifest.ignore:
        words += ["--ignore", pattern]
    if manifest.kernels == "default":
        words += ["--kernels", manifest.kernels]
    if manifest.seed:
        words += ["--seed", str(manifest.seed)]
    # Quotes come last: a fence or a line end would close the code block, and what stands for them needs quoting too.
    return " ".join(shlex.quote(" ".join(word.split()).replace("```", "'''")) for word in words)
