"""How long and how fast a run learns, and in which arithmetic."""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch

from llmopt.errors import UsageError


class Precision(StrEnum):
    """What products are computed in. Weights, their gradients and their updates are float32 in all of them."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def dtype(self) -> torch.dtype:
        """The one of torch."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """Of fp16, whose smallest gradients would be 0: the loss is multiplied by `start`.

    That is halved whenever a gradient overflows, and doubled behind `growth_steps` steps in which none did. Below
    `smallest` it is not the scale that makes them overflow.
    """

    start: float = 2.0**16
    growth_steps: int = 200
    smallest: float = 2.0**-14


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A run of `steps` steps, or of as many as fit into `seconds`; of both, what comes first.

    Rates rise for `warmup_steps` steps, and fall on a cosine to `final_share` of their peak when the run ends. The loss
    on held-out text is asked for `evaluations` times, the last at the end; behind `patience` of them without a new best
    the run ends, and what was best is what is left.
    """

    steps: int | None = None
    seconds: float | None = None
    precision: Precision = Precision.FP32
    scale: LossScale = LossScale()
    warmup_steps: int = 0
    final_share: float = 0.0
    clip: float | None = 1.0  # the norm of all gradients together, at most
    evaluations: int = 1
    patience: int | None = None
    checkpoint_steps: int | None = None
    checkpoint_seconds: float = 300.0

    def __post_init__(self) -> None:
        """See that the run ends.

        Raises:
            UsageError: it does not, or has no length.
        """
        if self.steps is None and self.seconds is None:
            raise UsageError("a run without end", hint="give a number of steps, or minutes")
        if (self.steps is not None and self.steps < 1) or (self.seconds is not None and not self.seconds > 0):
            raise UsageError(f"{self.steps} steps in {self.seconds} seconds are no run", hint="give more than 0")

    def done(self, step: int, elapsed_s: float) -> float:
        """How much of the run is behind us, from 0 to 1, before the step of that number, from 0."""
        by_steps = 0.0 if self.steps is None else step / self.steps
        by_time = 0.0 if self.seconds is None else elapsed_s / self.seconds
        return min(1.0, max(by_steps, by_time))

    def rate(self, step: int, elapsed_s: float) -> float:
        """The share of their peak that rates have in a step: a linear rise, then a cosine down."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        rise = self.warmup_steps / self.steps if self.steps else 0.0
        fallen = max(0.0, (self.done(step, elapsed_s) - rise) / (1.0 - rise)) if rise < 1.0 else 1.0
        return self.final_share + (1.0 - self.final_share) * 0.5 * (1.0 + math.cos(math.pi * fallen))
