"""What was measured, as a cluster file of one node."""

from pathlib import Path

import yaml

from llmopt.partition.cluster import SCHEMA, Cluster, DeviceClass, Link, Node, Speed, to_json
from llmopt.pipeline.probing import links
from llmopt.pipeline.probing.probe import DeviceProbe, Probe

NODE = "here"
_DIGITS = 4
_COMMENT = "# Measured by llmopt probe. Edit what you know better; llmopt partition plans with what stands here.\n"


def cluster(probe: Probe) -> Cluster:
    """One class of devices, as many as there are ranks.

    Speeds are those of a rank while all others do the same, as the ranks of a stage and full pipelines do.
    """
    kind = "gpu" if probe.device.is_gpu else "cpu"
    node = Node(name=NODE, devices={kind: probe.ranks}, link=_link(probe.messages), sums=_link(probe.sums))
    content = {"schema": SCHEMA, "devices": {kind: _device_class(probe.device)}, "nodes": [node]}
    return Cluster.model_validate(content)


def write_cluster(found: Cluster, path: Path, comment: str = _COMMENT) -> None:
    """Write a cluster file."""
    path.write_text(comment + yaml.safe_dump(to_json(found), sort_keys=False), encoding="utf-8")


def _device_class(device: DeviceProbe) -> DeviceClass:
    speeds = {
        kind: Speed(tflops=_rounded(speed.flops / 1e12), gb_per_s=_rounded(speed.bytes_per_s / 1e9))
        for kind, speed in device.together.speeds.items()
    }
    return DeviceClass(
        memory_gb=_rounded(device.memory_bytes / 1e9),
        reserved_gb=_rounded(device.process_bytes / 1e9),
        speeds=speeds,
        launch_us=_rounded(1e6 * device.together.block_s),
    )


def _link(link: links.Link | None) -> Link | None:
    if link is None:
        return None
    return Link(latency_us=_rounded(1e6 * link.latency_s), gb_per_s=_rounded(link.bytes_per_s / 1e9))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
