"""What each scheme would cost each group of layers: one pass forward and one back through the float model.

Forward, what enters each block is kept. At the head labels are drawn from the model, and from there the gradient goes
back block by block, each computed again from what entered it. So one block's weights are in memory at a time, and the
windows' hidden states between blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmopt.engine.base import TokenIds
from llmopt.engine.blocks import RotaryTables, block_forward, embed, normalize, plain
from llmopt.model.spec import Block, Linear, ModelSpec, TensorSpec
from llmopt.precision.fisher import Rows, draw_labels, head_fisher, linear_loss, lookup_loss
from llmopt.precision.groups import Group
from llmopt.progress import Task
from llmopt.quantize.method import InputStatistics
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.search import Search

CHUNK_WEIGHTS = 1 << 22  # of a table, at a time
# The estimate needs no better ranges than these: finer ones make all candidates better alike.
SEARCH, ROUNDING = Search(clip_steps=5), Rtn(clip_steps=4)

Weights = Mapping[str, Tensor]
Losses = tuple[float, ...]  # nats a token, of each candidate


class Tensors(Protocol):
    """Where weights come from: a checkpoint."""

    def read(self, tensor: TensorSpec) -> Tensor:
        """One tensor, float32, in its stored shape."""
        ...

    def read_rows(self, tensor: TensorSpec, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive) of a matrix."""
        ...


@dataclass
class Sensitivity:
    """Call `measure` once. `ids_BT` are windows of the same length."""

    spec: ModelSpec
    tensors: Tensors
    groups: Sequence[Group]
    ids_BT: TokenIds
    seed: int
    losses: dict[Group, Losses] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.tables = RotaryTables(self.spec, self.ids_BT.shape[1])
        self.group_of = {layer: group for group in self.groups for layer in group.layers}

    def measure(self, task: Task) -> Mapping[Group, Losses]:
        """The loss of each group's candidates; `task` has two steps a block and two more."""
        entering = self._forward(task)
        hidden_BTH = entering.pop()
        gradient_BTH = self._head(hidden_BTH)
        task.advance(note="head done")
        for block in reversed(self.spec.blocks):
            gradient_BTH = self._block(block, entering.pop(), gradient_BTH)
            task.advance(note=f"block {block.index + 1} of {len(self.spec.blocks)} done")
        self._embedding(gradient_BTH)
        task.advance()
        return self.losses

    @torch.no_grad()
    def _forward(self, task: Task) -> list[Tensor]:
        """What enters each block, and what leaves the last, [B, T, H] each."""
        embedding = self.spec.embedding
        entering = [embed(embedding, self._read(embedding.tensors()), torch.from_numpy(self.ids_BT))]
        for block in self.spec.blocks:
            weights, turn = self._read(block.tensors()), self.tables.turn(block, 0, self.ids_BT.shape[1])
            windows = [block_forward(block, weights, hidden_TH[None], turn) for hidden_TH in entering[-1]]
            entering.append(torch.cat(windows))
            task.advance()
        return entering

    def _head(self, hidden_BTH: Tensor) -> Tensor:
        """The gradient by what leaves the last block; the head's own losses are noted on the way."""
        head, norms = self.spec.head, self._read(self.spec.final_norm.tensors())
        hidden_BTH = hidden_BTH.detach().requires_grad_()
        x_BTH = normalize(self.spec.final_norm, norms, hidden_BTH)
        group = self.group_of[head.name]
        bias = self.tensors.read(TensorSpec(f"{head.name}.bias", (head.out_features,))) if head.bias else None
        with torch.no_grad():
            x_NH = x_BTH.flatten(0, 1)
            labels = draw_labels(x_NH, self._head_rows(bias), torch.Generator().manual_seed(self.seed))
            inputs = None if self.spec.tied else _statistics(x_NH)
            gradient_NH, losses = head_fisher(
                x_NH,
                labels,
                self._head_rows(bias),
                lambda rows: _errors(rows.weight_RH, group, inputs),
                len(group.candidates),
            )
        self._note(group, losses)
        torch.autograd.backward([x_BTH], [gradient_NH.view_as(x_BTH)])
        return _gradient(hidden_BTH)

    def _head_rows(self, bias: Tensor | None) -> Iterator[Rows]:
        weight = self.spec.head.weight
        step = max(1, CHUNK_WEIGHTS // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            stop = min(start + step, weight.shape[0])
            some = self.tensors.read_rows(weight, start, stop)
            yield Rows(start, some, None if bias is None else bias[start:stop])

    def _block(self, block: Block, entering_BTH: Tensor, gradient_BTH: Tensor) -> Tensor:
        """The gradient by what enters a block, from that by what leaves it."""
        weights, turn = self._read(block.tensors()), self.tables.turn(block, 0, self.ids_BT.shape[1])
        tape = _Tape(weights)
        before = []
        for hidden_TH, gradient_TH in zip(entering_BTH, gradient_BTH, strict=True):
            hidden_BTH = hidden_TH[None].detach().requires_grad_()
            leaving_BTH = block_forward(block, weights, hidden_BTH, turn, apply=tape.apply)
            torch.autograd.backward([leaving_BTH], [gradient_TH[None]])
            before.append(_gradient(hidden_BTH))
        linears = {linear.name: linear for linear in block.linears()}
        with torch.no_grad():
            for group in dict.fromkeys(self.group_of[name] for name in linears):
                self._note(group, _fused(group, [linears[name] for name in group.layers], weights, tape))
        return torch.cat(before)

    def _embedding(self, gradient_BTH: Tensor) -> None:
        """Rows that are looked up; a tied head's losses are there already, and these are added."""
        embedding = self.spec.embedding
        group = self.group_of[embedding.name]
        table = next(embedding.tensors())
        rows, place = np.unique(self.ids_BT, return_inverse=True)
        place_N, gradient_NH = torch.from_numpy(place.ravel()), gradient_BTH.flatten(0, 1) * embedding.scale
        weight_RH = torch.cat([self.tensors.read_rows(table, row, row + 1) for row in rows.tolist()])
        errors = _errors(weight_RH, group, None)
        self._note(group, [lookup_loss(error_RH[place_N], gradient_NH) for error_RH in errors])

    def _note(self, group: Group, losses: Sequence[float]) -> None:
        before = self.losses.get(group, (0.0,) * len(losses))
        self.losses[group] = tuple(map(sum, zip(before, losses, strict=True)))

    def _read(self, tensors: Iterator[TensorSpec]) -> dict[str, Tensor]:
        return {tensor.name: self.tensors.read(tensor) for tensor in tensors}


class _Tape:
    """Remembers what enters each linear of a block, and, after going back, the gradient by what left it."""

    def __init__(self, weights: Weights) -> None:
        self.plain = plain(weights)
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        y = self.plain(linear, x)
        y.retain_grad()
        self.seen.setdefault(linear.name, []).append((x.detach(), y))
        return y

    def inputs(self, linear: Linear) -> Tensor:
        """[tokens, in]"""
        return torch.cat([x.flatten(0, -2) for x, _ in self.seen[linear.name]])

    def gradients(self, linear: Linear) -> Tensor:
        """[tokens, out]"""
        return torch.cat([_gradient(y).flatten(0, -2) for _, y in self.seen[linear.name]])


def _fused(group: Group, linears: Sequence[Linear], weights: Weights, tape: _Tape) -> list[float]:
    """The losses of linears that share their input, as one weight."""
    stored = [(linear, weights[linear.weight.name]) for linear in linears]
    weight_OI = torch.cat([weight.T if linear.transposed else weight for linear, weight in stored])
    inputs_NI = tape.inputs(linears[0])
    gradients_NO = torch.cat([tape.gradients(linear) for linear in linears], dim=-1)
    errors = _errors(weight_OI, group, _statistics(inputs_NI))
    return [linear_loss(inputs_NI, gradients_NO, error_OI) for error_OI in errors]


def _errors(weight_OI: Tensor, group: Group, inputs: InputStatistics | None) -> Iterator[Tensor]:
    """W - Ŵ for each candidate, by a cheap method; without `inputs` by one that looks at the weight alone."""
    for scheme in group.candidates:
        if scheme is None:
            yield torch.zeros_like(weight_OI)
        elif inputs is None or scheme.bits == 8:  # whose ranges need no search
            yield weight_OI - ROUNDING.quantize(weight_OI, scheme).dequantize()
        else:
            yield weight_OI - SEARCH.quantize(weight_OI, scheme, inputs).dequantize()


def _statistics(inputs_NI: Tensor) -> InputStatistics:
    """As much of the second moment as the search looks at: its diagonal."""
    return InputStatistics(tokens=len(inputs_NI), second_moment_II=inputs_NI.square().mean(0).diag())


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
