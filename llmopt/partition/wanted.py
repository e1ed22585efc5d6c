"""What is asked for: a model, and what its plan is to be best at."""

from dataclasses import dataclass
from typing import Literal

from llmopt.model.parallel import TensorParallel
from llmopt.model.spec import ModelSpec
from llmopt.partition.cost import Precision
from llmopt.partition.degrees import shared_by
from llmopt.partition.promises import Promise

ObjectiveName = Literal["ttft", "tpot", "throughput", "devices", "price"]
OBJECTIVES: tuple[ObjectiveName, ...] = ("ttft", "tpot", "throughput", "devices", "price")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked of a plan. None: whatever is best."""

    objective: ObjectiveName = "tpot"
    promises: tuple[Promise, ...] = ()
    micro_batches: int | None = None
    replicas: int | None = None
    degree: int | None = None
    order: tuple[str, ...] | None = None
    split: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is to be divided: what it is called, what it is, and in which numbers it computes."""

    name: str
    spec: ModelSpec
    precision: Precision
    revision: str | None = None
    stored: bool = False  # whether its weights are stored in the schemes of its precision

    def shared_by(self, degree: int) -> TensorParallel:
        """Whether it can be cut over so many devices."""
        return shared_by(self.spec, self.precision.schemes, degree, stored=self.stored)
