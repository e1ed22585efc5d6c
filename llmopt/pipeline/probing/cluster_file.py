"""What was measured, as a cluster file."""

from pathlib import Path
from typing import Any

import yaml

from llmopt.pipeline.probing.compute import Compute
from llmopt.pipeline.probing.links import Link
from llmopt.pipeline.probing.probe import Probe

SCHEMA = "llmopt.cluster/1"
_DIGITS = 4


def write_cluster(probe: Probe, path: Path) -> dict[str, Any]:
    """Write a cluster of one node; gives what was written."""
    content = cluster(probe)
    comment = "# Measured by llmopt probe. Numbers may be edited; llmopt partition plans with what stands here.\n"
    path.write_text(comment + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return content


def cluster(probe: Probe) -> dict[str, Any]:
    """One class of devices, as many as there are ranks, and the links between them. Bytes, seconds, operations."""
    device = probe.device
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "devices": [
            {
                "name": device.name,
                "count": probe.ranks,
                "memory_bytes": device.memory_bytes,
                "process_bytes": device.process_bytes,
                "alone": _compute(device.alone),
                "together": _compute(device.together),
            }
        ],
    }
    if probe.messages is not None and probe.sums is not None:
        found["links"] = {"inside_node": {"messages": _link(probe.messages), "sums": _link(probe.sums)}}
    return found


def _compute(found: Compute) -> dict[str, Any]:
    return {
        "flops": {kind: _rounded(speed.flops) for kind, speed in found.speeds.items()},
        "bytes_per_s": {kind: _rounded(speed.bytes_per_s) for kind, speed in found.speeds.items()},
        "block_s": _rounded(found.block_s),
    }


def _link(link: Link) -> dict[str, float]:
    return {"latency_s": _rounded(link.latency_s), "bytes_per_s": _rounded(link.bytes_per_s)}


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
