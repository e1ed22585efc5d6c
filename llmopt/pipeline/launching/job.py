"""What every rank of a launch is told, as one JSON file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from llmopt.partition.runtime.layout import Layout
from llmopt.partition.runtime.schedule import WHOLE, MicroBatches
from llmopt.pipeline.stored import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Generate `output` tokens behind each row of `ids_BT`, `rounds` times after one that is not measured.

    Weights come from `model`, or from the shards in the folder `shards`, which were made for the plan `plan_hash`.
    `schemes` names that of each linear that has one: it is quantized as it is read, unless weights are `stored` so, in
    that format. All else has the `dtype`.
    """

    model: str
    layout: Layout
    ids_BT: tuple[tuple[int, ...], ...]
    output: int
    cut: MicroBatches = WHOLE
    rounds: int = 1
    keep_logits: bool = False
    timeout_s: float = 60.0
    revision: str | None = None
    shards: str | None = None
    plan_hash: str = ""
    dtype: str = "float32"
    schemes: Mapping[str, str] = field(default_factory=dict)
    stored: Format | None = None

    @property
    def symmetric(self) -> bool:
        """Whether activations are rounded by a range around 0, as the format has it."""
        return self.stored == "hf"

    @property
    def capacity(self) -> int:
        """Tokens of a sequence in the end."""
        return len(self.ids_BT[0]) + self.output


_JOB = TypeAdapter(Job)


def write_job(job: Job, path: Path) -> None:
    """Write a job for `read_job`."""
    path.write_bytes(_JOB.dump_json(job))


def read_job(path: Path) -> Job:
    """A job as it was written."""
    return _JOB.validate_json(path.read_bytes())
