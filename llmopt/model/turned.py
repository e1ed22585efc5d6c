"""The same model in another basis of its residual stream: x' = x R, with R orthogonal, [H, H].

Once its gain g is one, an RMS norm commutes with R, for it only looks at lengths. So gains go into what reads the
norms, and R into everything around the stream, tensor by tensor as they are read (Ashkboos et al. 2024, "QuaRot:
Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456, section 4, stage 1a):

    what reads the stream            W' = W diag(g) R
    what writes to it                W' = Rᵀ W, b' = b R
    the token table, positions       T' = T R
    a head with a table of its own   as what reads
    a head tied to the token table   T', behind another product by M = Rᵀ diag(g) R
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmopt.model.checkpoint import Tensors
from llmopt.model.spec import Block, Linear, ModelSpec, Norm, TensorSpec

CHUNK = 1 << 22  # values that are multiplied in float64 at once


def obstacle(spec: ModelSpec) -> str | None:
    """Why a model cannot be turned; None if it can."""
    norms = [spec.final_norm, *(norm for block in spec.blocks for norm in (block.attention_norm, block.mlp_norm))]
    if any(norm.kind != "rms" or norm.bias for norm in norms):
        return f"the norms of {spec.family} take the mean of all channels away"
    if any(block.attention_post_norm or block.mlp_post_norm for block in spec.blocks):
        return f"{spec.family} norms what a branch gives, channel by channel, before it is added"
    return None


def turned_spec(spec: ModelSpec) -> ModelSpec:
    """What a turned model is: the same, with a product before a tied head."""
    if not spec.tied:
        return spec
    name, size = f"{spec.head.name}.turn", spec.hidden_size
    return replace(spec, before_head=Linear(name=name, out_features=size, in_features=size))


class TurnedTensors:
    """The tensors of `turned_spec(spec)`, made of those of `spec` whenever they are read.

    Without a `turn_HH` the basis stays, and gains alone move. There must be no `obstacle`.
    """

    def __init__(self, tensors: Tensors, spec: ModelSpec, turn_HH: Tensor | None) -> None:
        assert obstacle(spec) is None
        self.spec = turned_spec(spec)
        self.before_head = None if self.spec.before_head is None else self.spec.before_head.weight
        self.tensors = tensors
        self.turn_HH = None if turn_HH is None else turn_HH.double()
        self.final_norm = spec.final_norm
        self.sides = dict(_sides(spec))
        norms = [spec.final_norm, *(norm for block in spec.blocks for norm in (block.attention_norm, block.mlp_norm))]
        self.unit = {f"{norm.name}.weight": 1 - norm.offset for norm in norms}

    def read(self, tensor: TensorSpec) -> Tensor:
        """The whole tensor, float32.

        Raises:
            ModelError: it cannot be read, or holds NaN or infinity.
        """
        if tensor.name in self.unit:
            return torch.full(tensor.shape, self.unit[tensor.name])
        if tensor == self.before_head:
            return self._through_gain()
        return self._turned(tensor, self.tensors.read(tensor))

    def read_rows(self, tensor: TensorSpec, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive) of a matrix; of one that reads the stream, and of a table, only they are
        read.

        Raises:
            ModelError: they cannot be read, or hold NaN or infinity.
        """
        side = self.sides.get(tensor.name)
        if tensor == self.before_head or (side is not None and side.axis == 0):
            return self.read(tensor)[start:stop].clone()
        return self._turned(tensor, self.tensors.read_rows(tensor, start, stop))

    def gain(self, norm: Norm) -> Tensor:
        """What a norm multiplies by in the stored model, [H]."""
        return self.tensors.read(next(norm.tensors())) + norm.offset

    def _turned(self, tensor: TensorSpec, values: Tensor) -> Tensor:
        side = self.sides.get(tensor.name)
        if side is None:
            return values
        if side.norm is not None:
            values = values * self.gain(side.norm)
        if self.turn_HH is None:
            return values
        return turned(values.movedim(side.axis, -1), self.turn_HH).movedim(-1, side.axis).contiguous()

    def _through_gain(self) -> Tensor:
        gain_H = self.gain(self.final_norm).double()
        turn_HH = torch.eye(len(gain_H), dtype=torch.float64) if self.turn_HH is None else self.turn_HH
        return ((turn_HH.T * gain_H) @ turn_HH).float()


def turned(values: Tensor, turn_HH: Tensor) -> Tensor:
    """Rows, [..., H] float32, times R, which is float64: some of them at a time, so that few are float64 at once."""
    rows_NH = values.reshape(-1, len(turn_HH))
    some = torch.split(rows_NH, max(1, CHUNK // len(turn_HH)))
    parts = [(part_NH.double() @ turn_HH).float() for part_NH in some]
    return torch.cat(parts).view(values.shape)


@dataclass(frozen=True, slots=True)
class _Side:
    """Which axis of a tensor is the stream's, and the norm whose gain it takes."""

    axis: int
    norm: Norm | None = None


def _sides(spec: ModelSpec) -> Iterable[tuple[str, _Side]]:
    """By the name of each tensor that reads the stream or writes to it."""
    yield from ((table.name, _Side(1)) for table in spec.embedding.tensors())
    for block in spec.blocks:
        yield from _sides_of(block).items()
    if not spec.tied:
        yield spec.head.weight.name, _Side(1, spec.final_norm)


def _sides_of(block: Block) -> Mapping[str, _Side]:
    attention, mlp = block.attention, block.mlp
    readers = ((attention.inputs, block.attention_norm), (mlp.inputs, block.mlp_norm))
    found = {linear.weight.name: _Side(1, norm) for linears, norm in readers for linear in linears}
    assert not any(linear.transposed for linear in block.linears()), "no family with such norms stores them so"
    for linear in (attention.output, mlp.down):
        found |= {tensor.name: _Side(0) for tensor in linear.tensors()}
    return found
