"""What a launch came to, from the first rank to the process that started it."""

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file

from llmopt.pipeline.launching.rank import Outcome, RankReport

_REPORTS = TypeAdapter(tuple[RankReport, ...])


def write_outcome(outcome: Outcome, path: Path) -> None:
    """Write what the first rank knows."""
    tensors = {"ids": outcome.ids_BT.contiguous()}
    if outcome.logits_BTV is not None:
        tensors["logits"] = outcome.logits_BTV.contiguous()
    save_file(tensors, path, {"reports": json.dumps([asdict(report) for report in outcome.reports])})


def read_outcome(path: Path) -> Outcome:
    """What was written."""
    with safe_open(path, framework="pt") as file:
        return Outcome(
            ids_BT=file.get_tensor("ids"),
            logits_BTV=file.get_tensor("logits") if "logits" in file.keys() else None,  # noqa: SIM118 (no mapping)
            reports=_REPORTS.validate_json(file.metadata()["reports"]),
        )
