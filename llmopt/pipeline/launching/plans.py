"""What a plan means for its ranks."""

import hashlib
import json

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
    return hashlib.sha256(json.dumps([plan.model, plan.revision, stages]).encode()).hexdigest()
