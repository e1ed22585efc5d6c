"""A checkpoint whose floats are rounded to one dtype, which is mostly the one that they had."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.errors import UnsupportedError
from llmopt.export.checkpoint.writer import CheckpointWriter
from llmopt.model.spec import Block
from llmopt.pipeline.calibration import Weights
from llmopt.quantize.weights import QuantizedWeight


@dataclass(frozen=True)
class RoundingWriter:
    """The files of a checkpoint; see `Writer`.

    Each part raises UnsupportedError where a value is too large for the dtype.
    """

    files: CheckpointWriter
    dtype: torch.dtype
    wide: frozenset[str] = frozenset()  # tensors that stay float32

    def embedding(self, weights: Weights) -> Weights:
        """See `Writer`."""
        stored = self._rounded(weights)
        self.files.embedding(stored)
        return stored

    def block(self, block: Block, weights: Weights) -> Weights:
        """See `Writer`."""
        stored = self._rounded(weights)
        self.files.block(block, stored)
        return stored

    def head(self, weights: Weights) -> Weights:
        """See `Writer`."""
        stored = self._rounded(weights)
        self.files.head(stored)
        return stored

    def save(self) -> None:
        """See `Writer`."""
        self.files.save()

    def close(self) -> None:
        """See `Writer`."""
        self.files.close()

    def _rounded(self, weights: Weights) -> Weights:
        return {name: self._stored(name, weight) for name, weight in weights.items()}

    def _stored(self, name: str, weight: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
        if isinstance(weight, QuantizedWeight):
            _require_within(name, float(weight.scales_OG.abs().max()) * weight.scheme.levels / 2, self.dtype)
            return weight
        if name in self.wide:
            return weight
        _require_within(name, float(weight.abs().max()), self.dtype)
        return weight.to(self.dtype).float()


def _require_within(name: str, largest: float, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    if largest > limit:
        word = str(dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"{name} reaches {largest:.3g}, and the checkpoint would hold it as {word}, which ends at {limit:.3g}",
            hint="--format onnx keeps float32",
        )
