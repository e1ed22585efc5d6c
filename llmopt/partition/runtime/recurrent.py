"""The part of an LSTM model that one rank holds. Its state is as long as a layer is wide, however many tokens came.

So micro-batches may cut prompts by tokens without a loss: a stage goes on from the state in which it was.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from llmopt.model.recurrent import Carried, RecurrentSpec
from llmopt.partition.runtime.layout import Layout, Seat

State = list[Carried | None]  # of each layer


class RecurrentStage:
    """Layers of a `RecurrentSpec`; satisfies `llmopt.partition.runtime.schedule.Stage`. A layer is not cut."""

    def __init__(self, spec: RecurrentSpec, layout: Layout, seat: Seat) -> None:
        stage = layout.stages[seat.stage]
        assert stage.degree == 1
        self.first, self.last = seat.stage == 0, seat.stage == len(layout.stages) - 1
        self.dtype = torch.float32
        self.width, self.vocabulary = spec.width, (0, spec.vocab_size)
        self._layers = [spec.layer(number) for number in range(stage.first, stage.stop)]
        self._table_VH = spec.table() if self.first else None
        self._head_VH = spec.head() if self.last else None

    @property
    def weight_bytes(self) -> int:
        """What the weights take."""
        tables = [table for table in (self._table_VH, self._head_VH) if table is not None]
        return sum(layer.nbytes for layer in self._layers) + sum(table.nbytes for table in tables)

    def state(self, batch: int) -> State:
        """Nothing seen yet."""
        return [None] * len(self._layers)

    def forward(self, inputs: Tensor, state: State, advance: Callable[[], None]) -> Tensor:
        """Hidden states [B, T, H] behind this stage, of ids [B, T] or hidden states; `state` is left as it is then."""
        hidden_BTH = inputs if self._table_VH is None else functional.embedding(inputs, self._table_VH)
        for number, layer in enumerate(self._layers):
            hidden_BTH, state[number] = layer(hidden_BTH, state[number])
            advance()
        return hidden_BTH

    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """Logits [B, V] behind the last token."""
        assert self._head_VH is not None
        return functional.linear(hidden_BTH[:, -1], self._head_VH)
