"""What a launch needs of a plan: who holds what, and what was predicted of it."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from llmopt.errors import UsageError
from llmopt.partition.runtime.layout import Layout, StageLayout

SCHEMA = "llmopt.plan/1"

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the plan was made for."""

    prompt: Count
    output: Count
    batch: Count = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """One stage and its prediction. `layers` is the first block and the one behind the last."""

    devices: tuple[str, ...]
    layers: tuple[int, int]
    tp: Count = 1
    weight_bytes: int | None = None
    kv_bytes: int | None = None
    activation_bytes: int | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None

    @property
    def memory_bytes(self) -> int | None:
        """All that it needs on each of its devices."""
        parts = (self.weight_bytes, self.kv_bytes, self.activation_bytes)
        return None if None in parts else sum(part for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Of the plan as a whole."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan as its file says it; what else the file says is of no use here."""

    model: str
    stages: Annotated[tuple[PlannedStage, ...], Field(min_length=1)]
    workload: Workload
    predicted: Predicted = field(default_factory=Predicted)
    revision: str | None = None
    micro_batches: Count = 1

    @property
    def layout(self) -> Layout:
        """Which rank holds what."""
        return Layout(
            tuple(
                StageLayout(first=stage.layers[0], stop=stage.layers[1], degree=stage.tp, devices=stage.devices)
                for stage in self.stages
            )
        )

    @property
    def hash(self) -> str:
        """SHA-256 of what decides which tensors each rank holds."""
        stages = [(stage.layers, stage.tp) for stage in self.stages]
        return hashlib.sha256(json.dumps([self.model, self.revision, stages]).encode()).hexdigest()


def read_plan(path: Path) -> Planned:
    """Read a plan.

    Raises:
        UsageError: there is none, or it does not say what a plan must.
    """
    try:
        text = path.read_bytes()
        content = json.loads(text)
    except OSError as error:
        raise UsageError(f"the plan cannot be read: {error.strerror}", where=str(path)) from error
    except ValueError as error:
        raise UsageError(f"the plan is not JSON: {error}", where=str(path)) from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        hint = "llmopt partition MODEL --cluster FILE -o PLAN writes one"
        raise UsageError(f"this is no plan: its schema is {schema!r}, not {SCHEMA}", where=str(path), hint=hint)
    try:
        plan = TypeAdapter(Planned).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"the plan's {key!r} is wrong: {first['msg']}", where=str(path)) from error
    for number, stage in enumerate(plan.stages):
        if len(stage.devices) != stage.tp:
            what = f"stage {number} has {len(stage.devices)} devices for a tensor-parallel degree of {stage.tp}"
            raise UsageError(what, where=str(path), hint="name one device for each rank")
    return plan
