"""The basis that the residual stream of a model is quantized in: the stored one, or a rotation that rounds better."""

from dataclasses import asdict, dataclass
from typing import Any

from llmopt.model.spec import ModelSpec
from llmopt.model.turned import obstacle
from llmopt.pipeline.formats.base import Assignments, Format

NOT_TURNED = "rotate leaves the residual stream as it is"


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """Which rotation was best (None: none), with the mean over linears of ‖y - ŷ‖² / ‖y‖² as stored and turned."""

    seed: int | None
    error_as_stored: float
    error_turned: float

    @property
    def note(self) -> str:
        """What was decided, and why."""
        what = NOT_TURNED if self.seed is None else "rotate turned the residual stream"
        return (
            f"{what}: squared errors of outputs, rounded to nearest, are {self.error_turned:.3g} of their squares with "
            f"the best of the rotations that were tried, and {self.error_as_stored:.3g} without"
        )

    def to_json(self) -> dict[str, Any]:
        """The form that a report and a journal hold."""
        return asdict(self)


def why_not(spec: ModelSpec, format_: Format, assignments: Assignments) -> str | None:
    """Why the stream of a model is not turned in this format with these schemes; None if it may be."""
    found = obstacle(spec)
    if found is None and spec.tied and not format_.before_head:
        found = f"format {format_.name} has no place for the product that a tied head then needs before it"
    # What a format keeps as floats may be turned; what was to stay as it is may not.
    left = (item for item in assignments.values() if item.scheme is None and item.reason != format_.tables.reason)
    kept = None if found is not None else next(left, None)
    return f"{kept.name} is to stay as it is" if kept is not None else found
