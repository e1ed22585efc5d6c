"""Does a cast artifact compute what its plan says? As for quantized ones, there are two checks.

In float32, over the stored weights, it must agree with torch to rounding. As it ships, activations are rounded to 16
bits in between, and its error may be that of the same rounding in torch, within a factor.
"""

from torch import Tensor

from llmopt.engine.base import TokenIds
from llmopt.engine.blocks import Apply, RotaryTables, Turn, in_own_dtype
from llmopt.errors import VerificationError
from llmopt.model.spec import Block, ModelSpec
from llmopt.pipeline.calibration import Weights
from llmopt.pipeline.verify import (
    FLOAT_TOLERANCE,
    ROUNDING_FACTOR,
    Agreement,
    ComputesLogits,
    Reference,
    Verification,
    agree,
    compare,
    floats,
    require,
)
from llmopt.precision.cast import CastPlan

NOT_SEEN = "the calibration text did not show it: give more with --calib, or keep what writes it with --keep-fp32"


class ShortTables(RotaryTables):
    """Rotary tables that blocks have in 16 bits, as graphs store them."""

    def __init__(self, spec: ModelSpec, length: int, plan: CastPlan) -> None:
        super().__init__(spec, length)
        self.plan = plan

    def turn(self, block: Block, start: int, stop: int) -> Turn | None:
        """See `RotaryTables`."""
        found = super().turn(block, start, stop)
        if found is None:
            return None
        dtype = self.plan.dtype_of(block.attention.inputs[0].name)
        cos_TR, sin_TR = (table_TR.to(dtype).float() for table_TR in found)
        return cos_TR, sin_TR


class WideReference(Reference):
    """The stored weights in float32, and activations too."""

    def embedding(self, weights: Weights) -> None:
        """See `Reference`."""
        super().embedding(_widened(weights))

    def block(self, block: Block, weights: Weights) -> None:
        """See `Reference`."""
        super().block(block, _widened(weights))

    def head(self, weights: Weights) -> None:
        """See `Reference`."""
        super().head(_widened(weights))


class ShortReference(Reference):
    """Mixed precision in torch: every weight in its own dtype, and activations in those of what writes them.

    Where a reference of floats raises a ModelError, this one raises a VerificationError: 16 bits overflow.
    """

    def _apply(self, weights: Weights) -> Apply:
        return in_own_dtype(floats(weights))

    def _require_finite(self, activations: Tensor, where: str) -> None:
        if not bool(activations.isfinite().all()):
            raise VerificationError("activations overflow 16 bits", where=where, hint=NOT_SEEN)


class CastReferences:
    """Both references, fed together with weights in their own dtypes."""

    def __init__(self, spec: ModelSpec, windows: list[TokenIds], plan: CastPlan, *, short_tables: bool) -> None:
        self.exact = WideReference(spec, windows, round_activations=False)
        self.rounded = ShortReference(spec, windows, round_activations=False)
        if short_tables:
            self.exact.tables = ShortTables(spec, max(map(len, windows)), plan)

    def embedding(self, weights: Weights) -> None:
        """See `Reference`."""
        self.exact.embedding(weights)
        self.rounded.embedding(weights)

    def block(self, block: Block, weights: Weights) -> None:
        """See `Reference`."""
        self.exact.block(block, weights)
        self.rounded.block(block, weights)

    def head(self, weights: Weights) -> None:
        """See `Reference`."""
        self.exact.head(weights)
        self.rounded.head(weights)


def check(references: CastReferences, in_float32: Agreement, shipped: ComputesLogits, dtype_name: str) -> Verification:
    """Hold what was opened, in float32 and as it ships, against the references.

    Raises:
        VerificationError: it computes something else, or overflows.
    """
    exact, rounded = references.exact, references.rounded
    require(in_float32, FLOAT_TOLERANCE, "in float32")
    in_torch = agree([(exact.logits(index), rounded.logits(index)) for index in range(len(exact.windows))])
    as_shipped = compare(shipped, exact)
    require(as_shipped, ROUNDING_FACTOR * in_torch.relative_error + FLOAT_TOLERANCE, f"in {dtype_name}")
    return Verification(exact=in_float32, shipped=as_shipped, rounded=in_torch)


def _widened(weights: Weights) -> Weights:
    return {name: weight.float() for name, weight in floats(weights).items()}
