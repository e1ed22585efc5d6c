"""A plan on the way to be one, and what it is worth."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmopt.errors import UsageError
from llmopt.partition.cluster import Cluster, Device
from llmopt.partition.machine import Machine, Metric
from llmopt.partition.orders import Solution
from llmopt.partition.plan import Predicted, Stage
from llmopt.partition.promises import Promise


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Stages on devices, and what is predicted of them."""

    machine: Machine
    devices: tuple[Device, ...]
    stages: tuple[Stage, ...]
    predicted: Predicted

    def keeps(self, promises: Sequence[Promise]) -> bool:
        """Whether it keeps all of them."""
        return all(promise.kept(self.predicted) for promise in promises)

    def used(self) -> list[Device]:
        """Those of one replica."""
        named = {device.name: device for device in self.devices}
        return [named[name] for stage in self.stages for name in stage.devices]


def candidate_from(machine: Machine, solution: Solution) -> Candidate:
    """What a search found, with its predictions."""
    stages = machine.stages(solution.devices, solution.pieces)
    return Candidate(machine=machine, devices=solution.devices, stages=stages, predicted=machine.predicted(stages))


def worth(candidate: Candidate, objective: str, cluster: Cluster) -> float:
    """What is minimized: ms to the first token, for each token, or for each token of all sequences together; or what
    the devices cost."""
    if objective == "ttft":
        return candidate.predicted.ttft_ms
    if objective == "tpot":
        return candidate.predicted.tpot_ms
    if objective == "throughput":
        return 1000 / candidate.predicted.throughput_tokens_per_s
    tolls = tolls_of(objective, cluster, candidate.used())
    return sum(tolls[device.kind] for device in candidate.used()) * candidate.machine.replicas


def tolls_of(objective: str, cluster: Cluster, devices: Sequence[Device]) -> dict[str, float]:
    """What a device of each class costs.

    Raises:
        UsageError: nobody knows.
    """
    kinds = list(dict.fromkeys(device.kind for device in devices))
    if objective == "devices":
        return dict.fromkeys(kinds, 1.0)
    prices = {kind: cluster.device_class(kind).price_per_hour for kind in kinds}
    for kind, price in prices.items():
        if price is None:
            what = f"nothing is known of the price of {kind}"
            raise UsageError(what, where=f"devices.{kind}", hint="add price_per_hour to the cluster file")
    return {kind: price for kind, price in prices.items() if price is not None}


def metric_of(objective: str) -> Metric | None:
    """The metric that an objective is; None for what devices cost."""
    metrics: dict[str, Metric] = {"ttft": "ttft", "tpot": "tpot", "throughput": "throughput"}
    return metrics.get(objective)
