"""A cluster file corrected by a run: what was predicted from it is set right, class by class."""

from collections.abc import Iterator
from statistics import geometric_mean

from llmopt.partition.cluster import Cluster
from llmopt.partition.device import DeviceClass
from llmopt.partition.plan import Plan
from llmopt.pipeline.launching.plans import cluster_of, device_of
from llmopt.pipeline.launching.result import LaunchResult, StageResult

_DIGITS = 4


def calibrated(plan: Plan, result: LaunchResult) -> Cluster:
    """The plan's cluster, with speeds by which its stages would have been predicted as they were measured.

    Prefill corrects the operations a second, decode the bytes a second, of all kinds of weights alike. A class with
    several stages is corrected by the geometric mean of theirs; one that did not run, or was not predicted, stays.
    """
    cluster = cluster_of(plan)
    stages: dict[str, list[StageResult]] = {}
    for stage in result.stages:
        stages.setdefault(device_of(plan, stage.devices[0]).kind, []).append(stage)
    corrected = {kind: _corrected(cluster.device_class(kind), found) for kind, found in stages.items()}
    return cluster.model_copy(update={"devices": {**cluster.devices, **corrected}})


def _corrected(device: DeviceClass, stages: list[StageResult]) -> DeviceClass:
    prefill, decode = (geometric_mean(list(_ratios(stages, name)) or [1.0]) for name in ("prefill_ms", "decode_ms"))
    speeds = {
        kind: speed.model_copy(
            update={"tflops": _rounded(speed.tflops * prefill), "gb_per_s": _rounded(speed.gb_per_s * decode)}
        )
        for kind, speed in device.speeds.items()
    }
    return device.model_copy(update={"speeds": speeds, "source": "measured"})


def _ratios(stages: list[StageResult], name: str) -> Iterator[float]:
    """Predicted over measured: how much faster than believed."""
    for stage in stages:
        compared = getattr(stage, name)
        if compared.predicted and compared.measured:
            yield compared.predicted / compared.measured


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
