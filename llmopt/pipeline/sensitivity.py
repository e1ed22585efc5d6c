"""What each scheme would cost each group of layers: one pass forward and one back through the float model.

Forward, what enters each block is kept. At the head labels are drawn from the model, and from there the gradient goes
back block by block, each computed again from what entered it. So one block's weights are in memory at a time, and the
windows' hidden states between blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llmopt.engine.base import TokenIds
from llmopt.engine.blocks import RotaryTables, block_forward, embed, head_inputs, plain
from llmopt.model.checkpoint import Tensors
from llmopt.model.spec import Block, Linear, ModelSpec, TensorSpec
from llmopt.precision.fisher import Rows, add_information, draw_labels, head_gradient, predicted_loss
from llmopt.precision.groups import Group
from llmopt.progress import Task
from llmopt.quantize.method import InputStatistics
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.search import Search

CHUNK_LOGITS = 1 << 23  # of all tokens, for some rows of the head at a time: a few temporaries are of this size
# The estimate needs no better ranges than these: finer ones make all candidates better alike.
SEARCH, ROUNDING = Search(clip_steps=5), Rtn(clip_steps=4)

Weights = Mapping[str, Tensor]
Losses = tuple[float, ...]  # nats a token, of each candidate


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
        head, weights = self.spec.head, self._read(self.spec.tensors_before_head())
        group = self.group_of[head.name]
        bias = self.tensors.read(TensorSpec(f"{head.name}.bias", (head.out_features,))) if head.bias else None
        hidden_BTH = hidden_BTH.detach().requires_grad_()
        x_BTH = head_inputs(self.spec, weights, hidden_BTH)
        with torch.no_grad():
            x_NH = x_BTH.flatten(0, 1)
            labels = draw_labels(x_NH, self._head_rows(bias), torch.Generator().manual_seed(self.seed))
            inputs = None if self.spec.tied else _statistics(x_NH.square().mean(0))
            gradient_NH = torch.zeros_like(x_NH)
            for rows, part_NH, information_RH in head_gradient(x_NH, labels, self._head_rows(bias)):
                gradient_NH += part_NH
                self._note(group, rows.weight_RH, information_RH, inputs)
        torch.autograd.backward([x_BTH], [gradient_NH.view_as(x_BTH)])
        return _gradient(hidden_BTH)

    def _head_rows(self, bias: Tensor | None) -> Iterator[Rows]:
        weight = self.spec.head.weight
        step = max(1, CHUNK_LOGITS // self.ids_BT.size)
        for start in range(0, weight.shape[0], step):
            stop = min(start + step, weight.shape[0])
            some = self.tensors.read_rows(weight, start, stop)
            yield Rows(start, some, None if bias is None else bias[start:stop])

    def _block(self, block: Block, entering_BTH: Tensor, gradient_BTH: Tensor) -> Tensor:
        """The gradient by what enters a block, from that by what leaves it."""
        weights, turn = self._read(block.tensors()), self.tables.turn(block, 0, self.ids_BT.shape[1])
        linears = {linear.name: linear for linear in block.linears()}
        seen = {name: _Seen(linear) for name, linear in linears.items()}
        before = []
        for hidden_TH, gradient_TH in zip(entering_BTH, gradient_BTH, strict=True):
            tape = _Tape(weights)
            hidden_BTH = hidden_TH[None].detach().requires_grad_()
            leaving_BTH = block_forward(block, weights, hidden_BTH, turn, apply=tape.apply)
            torch.autograd.backward([leaving_BTH], [gradient_TH[None]])
            before.append(_gradient(hidden_BTH))
            for name, (inputs_TI, outputs_TO) in tape.seen.items():
                seen[name].add(inputs_TI, _gradient(outputs_TO).flatten(0, -2))
        for group in dict.fromkeys(self.group_of[name] for name in linears):
            stored = [(linears[name], weights[linears[name].weight.name]) for name in group.layers]
            weight_OI = torch.cat([weight.T if linear.transposed else weight for linear, weight in stored])
            information_OI = torch.cat([seen[name].information_OI for name in group.layers]) / self.ids_BT.size
            self._note(group, weight_OI, information_OI, _statistics(seen[group.layers[0]].squares_I))
        return torch.cat(before)

    def _embedding(self, gradient_BTH: Tensor) -> None:
        """Rows that are looked up; a tied head's losses are there already, and these are added."""
        embedding = self.spec.embedding
        rows, place = np.unique(self.ids_BT, return_inverse=True)
        table = next(embedding.tensors())
        weight_RH = torch.cat([self.tensors.read_rows(table, row, row + 1) for row in rows.tolist()])
        information_RH = torch.zeros_like(weight_RH)
        for row_T, gradient_TH in zip(torch.from_numpy(place.reshape(self.ids_BT.shape)), gradient_BTH, strict=True):
            sum_RH = torch.zeros_like(weight_RH).index_add_(0, row_T, gradient_TH * embedding.scale)
            information_RH += sum_RH.square_()
        self._note(self.group_of[embedding.name], weight_RH, information_RH / self.ids_BT.size, None)

    def _note(self, group: Group, weight_OI: Tensor, information_OI: Tensor, inputs: InputStatistics | None) -> None:
        """Add what each candidate would cost in these rows of a group's weights."""
        found = [predicted_loss(information_OI, error_OI) for error_OI in _errors(weight_OI, group, inputs)]
        before = self.losses.get(group, (0.0,) * len(found))
        self.losses[group] = tuple(map(sum, zip(before, found, strict=True)))

    def _read(self, tensors: Iterator[TensorSpec]) -> dict[str, Tensor]:
        return {tensor.name: self.tensors.read(tensor) for tensor in tensors}


class _Tape:
    """Remembers what enters each linear of a block, and what leaves it with, after going back, the gradient by it."""

    def __init__(self, weights: Weights) -> None:
        self.plain = plain(weights)
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        y = self.plain(linear, x)
        y.retain_grad()
        self.seen[linear.name] = x.detach().flatten(0, -2), y
        return y


class _Seen:
    """Sums over the windows: a linear's information, and the squares of its inputs."""

    def __init__(self, linear: Linear) -> None:
        self.information_OI = torch.zeros((linear.out_features, linear.in_features))
        self.squares_I = torch.zeros(linear.in_features)

    def add(self, inputs_TI: Tensor, gradients_TO: Tensor) -> None:
        add_information(self.information_OI, inputs_TI, gradients_TO)
        self.squares_I += inputs_TI.square().sum(0)


def _errors(weight_OI: Tensor, group: Group, inputs: InputStatistics | None) -> Iterator[Tensor]:
    """W - Ŵ for each candidate, by a cheap method; without `inputs` by one that looks at the weight alone."""
    for scheme in group.candidates:
        if scheme is None:
            yield torch.zeros_like(weight_OI)
        elif inputs is None or scheme.bits == 8:  # whose ranges need no search
            yield weight_OI - ROUNDING.quantize(weight_OI, scheme).dequantize()
        else:
            yield weight_OI - SEARCH.quantize(weight_OI, scheme, inputs).dequantize()


def _statistics(squares_I: Tensor) -> InputStatistics:
    """As much of the second moment as the search looks at: its diagonal, up to a factor."""
    return InputStatistics(tokens=1, second_moment_II=squares_I.diag())


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
