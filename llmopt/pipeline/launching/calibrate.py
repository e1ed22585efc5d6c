"""A cluster file corrected by a run: what was predicted from it is set right, class by class."""

from collections.abc import Iterator
from statistics import geometric_mean

from llmopt.partition.cluster import Cluster
from llmopt.partition.device import DeviceClass, Speed
from llmopt.partition.plan import Plan
from llmopt.pipeline.launching.plans import cluster_of, device_of
from llmopt.pipeline.launching.result import LaunchResult, StageResult
from llmopt.recipe.schema import Section

_DIGITS = 4


def calibrated(plan: Plan, result: LaunchResult) -> Cluster:
    """The plan's cluster, with speeds by which its stages would have been predicted as they were measured.

    Prefill corrects what several tokens take, decode what one takes and what a call costs, of all kinds of weights
    alike. A class with several stages is corrected by the geometric mean of theirs; one that did not run, or was not
    predicted, stays.
    """
    cluster = cluster_of(plan)
    stages: dict[str, list[StageResult]] = {}
    for stage in result.stages:
        stages.setdefault(device_of(plan, stage.devices[0]).kind, []).append(stage)
    corrected = {kind: _corrected(cluster.device_class(kind), found) for kind, found in stages.items()}
    return cluster.model_copy(update={"devices": {**cluster.devices, **corrected}})


def _corrected(device: DeviceClass, stages: list[StageResult]) -> DeviceClass:
    prefill, decode = (geometric_mean(list(_ratios(stages, name)) or [1.0]) for name in ("prefill_ms", "decode_ms"))
    return device.model_copy(
        update={
            **_changed(device, launch_us=1 / decode, passing_gb_per_s=prefill),
            "speeds": {kind: _corrected_speed(speed, prefill, decode) for kind, speed in device.speeds.items()},
            "attention": None
            if device.attention is None
            else device.attention.model_copy(update=_changed(device.attention, tflops=prefill, gb_per_s=decode)),
            "source": "measured",
        }
    )


def _corrected_speed(speed: Speed, prefill: float, decode: float) -> Speed:
    many = _changed(speed, tflops=prefill, packing_gb_per_s=prefill, passing_gb_per_s=prefill)
    one = _changed(speed, gb_per_s=decode, row_ns=1 / decode, call_us=1 / decode)
    return speed.model_copy(update=many | one)


def _changed(section: Section, **factors: float) -> dict[str, float]:
    """What is known of these numbers, each times its factor."""
    known = {name: getattr(section, name) for name in factors}
    return {name: _rounded(value * factors[name]) for name, value in known.items() if value is not None}


def _ratios(stages: list[StageResult], name: str) -> Iterator[float]:
    """Predicted over measured: how much faster than believed."""
    for stage in stages:
        compared = getattr(stage, name)
        if compared.predicted and compared.measured:
            yield compared.predicted / compared.measured


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
