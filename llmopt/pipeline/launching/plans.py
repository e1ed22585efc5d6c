"""What a plan means for its ranks."""

import hashlib
import json

from pydantic import ValidationError

from llmopt.errors import UsageError
from llmopt.partition.cluster import Cluster, Device, cluster_from_json
from llmopt.partition.plan import Plan
from llmopt.partition.runtime.layout import Layout, StageLayout


def layout_of(plan: Plan) -> Layout:
    """Which rank holds what, of one replica."""
    return Layout(
        tuple(
            StageLayout(first=stage.layers[0], stop=stage.layers[1], degree=stage.tp, devices=stage.devices)
            for stage in plan.stages
        )
    )


def hash_of(plan: Plan) -> str:
    """SHA-256, in hex, of what decides which tensors each rank holds: times and devices may change."""
    stages = [(*stage.layers, stage.tp) for stage in plan.stages]
    schemes = [dict(plan.schemes)] if plan.schemes else []
    return hashlib.sha256(json.dumps([plan.model, plan.revision, stages, *schemes]).encode()).hexdigest()


def cluster_of(plan: Plan) -> Cluster:
    """The cluster that a plan was made for.

    Raises:
        UsageError: it carries none.
    """
    try:
        return cluster_from_json(plan.cluster)
    except ValidationError as error:
        what = f"the plan's cluster is wrong: {error.errors()[0]['msg']}"
        raise UsageError(what, hint="make the plan anew with llmopt partition") from error


def device_of(plan: Plan, name: str) -> Device:
    """A device of the plan's cluster.

    Raises:
        UsageError: it has none of that name.
    """
    for device in cluster_of(plan).all_devices():
        if device.name == name:
            return device
    raise UsageError(f"the plan's cluster has no device {name!r}", hint="make the plan anew with llmopt partition")
