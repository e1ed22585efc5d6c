"""What an artifact's report says of its making outlives measurements."""

import json
from pathlib import Path

from llmopt.pipeline.kept import kept_settings


def test_all_that_is_said_of_its_making_is_kept_and_no_measurement(tmp_path: Path) -> None:
    making = {
        name: {"of": name} for name in ("calibration", "basis", "budget", "training", "cast", "kernels", "verification")
    }
    measured = {"fidelity": {"tokens": 8}, "latency": {"rounds": 2}}
    (tmp_path / "report.json").write_text(json.dumps({"settings": making | measured}))
    assert kept_settings(tmp_path) == making


def test_nothing_is_kept_where_no_report_is(tmp_path: Path) -> None:
    assert kept_settings(tmp_path) == {}
