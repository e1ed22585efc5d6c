"""What the parts of a cast model are written to: a checkpoint or a graph, each tensor in the dtype of its module."""

from dataclasses import dataclass
from typing import Protocol

from llmopt.export.checkpoint.writer import CheckpointWriter
from llmopt.export.checkpoint.writer import Weights as WeightsLike
from llmopt.model.spec import Block, ModelSpec
from llmopt.pipeline.calibration import Weights
from llmopt.pipeline.verify import floats
from llmopt.precision.cast import CastPlan, module_of


class _Files(Protocol):
    """What parts are written to."""

    def embedding(self, weights: Weights) -> object: ...

    def block(self, block: Block, weights: Weights) -> object: ...

    def head(self, weights: Weights) -> object: ...

    def save(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class CastWriter:
    """Gives each tensor the dtype of its module, and hands it on; see `Writer`."""

    files: _Files
    spec: ModelSpec
    plan: CastPlan

    def embedding(self, weights: Weights) -> Weights:
        """See `Writer`."""
        stored = self._cast(weights)
        self.files.embedding(stored)
        return stored

    def block(self, block: Block, weights: Weights) -> Weights:
        """See `Writer`."""
        stored = self._cast(weights)
        self.files.block(block, stored)
        return stored

    def head(self, weights: Weights) -> Weights:
        """See `Writer`."""
        stored = self._cast(weights)
        self.files.head(stored)
        return stored

    def save(self) -> None:
        """See `Writer`."""
        self.files.save()

    def close(self) -> None:
        """See `Writer`."""
        self.files.close()

    def _cast(self, weights: Weights) -> Weights:
        return {
            name: weight.to(self.plan.dtype_of(module_of(self.spec, name))) for name, weight in floats(weights).items()
        }


class StoredOrder(CheckpointWriter):
    """A checkpoint that takes linears as [out, in], whichever way round it stores them."""

    def block(self, block: Block, weights: WeightsLike) -> None:
        """One block."""
        turned = {linear.weight.name for linear in block.linears() if linear.transposed}
        found = floats(dict(weights)).items()
        super().block(block, {name: weight.T if name in turned else weight for name, weight in found})
