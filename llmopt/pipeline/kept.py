"""What lies beside an artifact's graph and is no part of it: its report, and the model card that shows it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmopt.artifact import MODEL_CARD, REPORT, load_manifest, write_json, write_text
from llmopt.export.card import Card, card_text
from llmopt.model.source import CONFIG
from llmopt.report.results import LayerResult, Report
from llmopt.words import counted

# Of an artifact's settings, those that no measurement replaces.
MAKING = ("calibration", "basis", "budget", "training", "cast", "kernels", "verification")


def keep(folder: Path, report: Report) -> None:
    """Write an artifact's own report, and its model card anew with what was measured."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    card = card_text(Card.of(load_manifest(folder), config, report))
    write_json(folder / REPORT, report.to_json())
    write_text(folder / MODEL_CARD, card)


def lost_by(folder: Path, report: Report) -> str | None:
    """What an artifact's report says of a larger measurement than the one that would take its place."""
    lost = list(_larger(_kept(folder).get("settings", {}), report.settings))
    return ", ".join(lost) if lost else None


def kept_layers(folder: Path) -> tuple[LayerResult, ...]:
    """What the report of an artifact says of its layers; nothing for a baseline."""
    candidates = _kept(folder).get("candidates") or [{}]
    return tuple(LayerResult(**layer) for layer in candidates[0].get("layers", ()))


def kept_settings(folder: Path) -> dict[str, Any]:
    """What the report of an artifact says of its making: what it was calibrated on, how well the export agreed."""
    settings = _kept(folder).get("settings", {})
    return {name: settings[name] for name in MAKING if name in settings}


def _larger(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for section, count, unit in (("fidelity", "tokens", "token"), ("latency", "rounds", "round")):
        had, has = (settings.get(section, {}).get(count, 0) for settings in (before, after))
        if has < had:
            yield f"{counted(had, unit)}, now {has:,}"


def _kept(folder: Path) -> Mapping[str, Any]:
    path = folder / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
