"""A plan: which device group has which blocks, and what that is predicted to take; as values and as plan.json.

The file is checked when it is read: blocks without a stage, or with two, are refused, and so are groups of the wrong
size.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from llmopt.artifact import write_json
from llmopt.errors import ArtifactError, UsageError

SCHEMA = "llmopt.plan/1"

Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Time = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a plan is for: `batch` prompts at once, of `prompt` tokens each, and `output` tokens behind them."""

    prompt: Count
    output: Count
    batch: Count = 1

    @property
    def context(self) -> int:
        """Tokens in the cache at the end."""
        return self.prompt + self.output


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Blocks `layers[0]` to `layers[1]`, exclusive, on `tp` devices of one class.

    Bytes are those on each of the devices. Times are those of one micro-batch, receiving it included, which takes the
    hop; for the last stage that is also the token's way back.
    """

    devices: tuple[str, ...]
    tp: Count
    layers: tuple[Size, Size]
    embedding: bool
    lm_head: bool
    weight_bytes: Size
    kv_bytes: Size
    activation_bytes: Size
    prefill_ms: Time
    decode_ms: Time
    prefill_hop_ms: Time = 0.0
    decode_hop_ms: Time = 0.0

    @property
    def memory_bytes(self) -> int:
        """All that the stage needs on each of its devices."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What a plan takes. Throughput counts output tokens of all replicas, the stages kept as busy as they can be."""

    ttft_ms: Time
    tpot_ms: Time
    throughput_tokens_per_s: Time


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan and everything that it was made from. `stages` are those of one replica.

    `value` is what was minimized: ms for times, ms an output token for throughput, devices, or price an hour.
    `lower_bound_ms` is what no plan goes below, in the unit of `value`; `gap` is how far this one is above it.
    """

    __pydantic_config__ = ConfigDict(extra="ignore")

    model: str
    cluster: Mapping[str, Any]
    objective: str
    workload: Workload
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    predicted: Predicted
    revision: str | None = None
    dtype: str | None = None
    micro_batches: Count = 1
    replicas: Count = 1
    schemes: Mapping[str, str] = field(default_factory=dict)
    baselines: Mapping[str, Predicted | None] = field(default_factory=dict)
    value: float | None = None
    lower_bound_ms: float | None = None
    gap: float | None = None
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Devices of one replica."""
        return sum(stage.tp for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """What plan.json holds."""
        return {"schema": SCHEMA, **asdict(self)}


def write_plan(path: Path, plan: Plan) -> None:
    """Write plan.json."""
    write_json(path, plan.to_json())


def read_plan(path: Path) -> Plan:
    """Read plan.json and check that it hangs together.

    Raises:
        ArtifactError: there is none, or it cannot be read.
        UsageError: it is no plan, or one that holds blocks twice or not at all.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"the plan cannot be read: {error.strerror}", where=str(path)) from error
    except ValueError as error:
        raise UsageError(f"the plan is not JSON: {error}", where=str(path)) from error
    return plan_from_json(content, where=str(path))


def plan_from_json(content: Any, *, where: str) -> Plan:
    """A plan from what plan.json holds.

    Raises:
        UsageError: it is no plan, or one that holds blocks twice or not at all.
    """
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        hint = "llmopt partition MODEL --cluster FILE -o PLAN writes one"
        raise UsageError(f"this is no plan: its schema is {schema!r}, not {SCHEMA!r}", where=where, hint=hint)
    try:
        plan = TypeAdapter(Plan).validate_python({key: content[key] for key in content if key != "schema"})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UsageError(f"the plan's {key!r} is wrong: {first['msg']}", where=where) from error
    _require_whole(plan, where)
    return plan


def _require_whole(plan: Plan, where: str) -> None:
    stop, named = 0, set[str]()
    for number, stage in enumerate(plan.stages):
        if stage.layers[0] != stop or stage.layers[1] < stop:
            what = f"stage {number} has blocks {stage.layers[0]} to {stage.layers[1]}, where block {stop} is next"
            raise UsageError(what, where=where, hint="make the plan anew with llmopt partition")
        stop = stage.layers[1]
        if len(stage.devices) != stage.tp:
            what = f"stage {number} has {len(stage.devices)} devices for a tensor-parallel degree of {stage.tp}"
            raise UsageError(what, where=where, hint="name one device for each rank")
        if (stage.embedding, stage.lm_head) != (number == 0, number == len(plan.stages) - 1):
            raise UsageError(f"stage {number} cannot have that embedding or head", where=where)
        if named & set(stage.devices) or len(set(stage.devices)) < stage.tp:
            raise UsageError(f"stage {number} has a device that is in use already", where=where)
        named |= set(stage.devices)
