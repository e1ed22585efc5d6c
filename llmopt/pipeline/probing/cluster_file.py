"""What was measured, as a cluster file of one node."""

from pathlib import Path
from typing import TypeVar

import yaml

from llmopt.artifact import write_text
from llmopt.partition.cluster import SCHEMA, Cluster, Node, to_json
from llmopt.partition.device import Attending, DeviceClass, Link, Speed
from llmopt.pipeline.probing import links
from llmopt.pipeline.probing.probe import DeviceProbe, Probe

NODE = "here"
_DIGITS = 4
_Some = TypeVar("_Some", Speed, Attending)
_COMMENT = "# Measured by llmopt probe. Edit what you know better; llmopt partition plans with what stands here.\n"


def cluster(probe: Probe) -> Cluster:
    """One class of devices, as many as there are ranks.

    Speeds are those of a rank alone; `shared` says what is left of them while all others do the same.
    """
    kind = "gpu" if probe.device.is_gpu else "cpu"
    node = Node(name=NODE, devices={kind: probe.ranks}, link=_link(probe.messages), sums=_link(probe.sums))
    content = {"schema": SCHEMA, "devices": {kind: _device_class(probe.device)}, "nodes": [node]}
    return Cluster.model_validate(content)


def write_cluster(found: Cluster, path: Path, comment: str = _COMMENT) -> None:
    """Write a cluster file."""
    write_text(path, comment + yaml.safe_dump(to_json(found), sort_keys=False, default_flow_style=None))


def _device_class(device: DeviceProbe) -> DeviceClass:
    rest = device.compute.rest
    return DeviceClass(
        memory_gb=_rounded(device.memory_bytes / 1e9),
        reserved_gb=_rounded(device.process_bytes / 1e9),
        speeds={kind: _rounded_speed(speed) for kind, speed in device.compute.speeds.items()},
        launch_us=_rounded(1e6 * rest.launch_s),
        attention=_rounded_all(rest.attention),
        passing_gb_per_s=None if rest.passing_bytes_per_s is None else _rounded(rest.passing_bytes_per_s / 1e9),
        shared=_rounded(device.kept.many),
        shared_token=_rounded(device.kept.one),
        waking_us=_rounded(1e6 * device.kept.waking_s),
        expands=True,  # torch has no products with codes of weights alone
    )


def _rounded_speed(speed: Speed) -> Speed:
    factors = {
        name: [(place, _rounded(factor)) for place, factor in getattr(speed, name)]
        for name in ("factors", "row_factors", "size_factors", "block_factors")
    }
    return _rounded_all(speed).model_copy(update=factors)


def _rounded_all(section: _Some) -> _Some:
    return section.model_copy(update={name: _rounded(value) for name, value in section if isinstance(value, float)})


def _link(link: links.Link | None) -> Link | None:
    if link is None:
        return None
    return Link(latency_us=_rounded(1e6 * link.latency_s), gb_per_s=_rounded(link.bytes_per_s / 1e9))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
