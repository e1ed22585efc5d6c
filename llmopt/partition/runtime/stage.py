"""The part of a decoder that one rank holds and computes: token ids or hidden states in, hidden states or logits out.

Axes as in `llmopt.engine.blocks`. Ranks of one stage do the same at the same time and add up what they have.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from llmopt.engine.blocks import Apply, KvCache, RotaryTables, Weights, block_forward, head_logits, plain
from llmopt.model.spec import Block, Linear, ModelSpec
from llmopt.partition.runtime.cut import Cut, Share, block_cuts, embedding_cuts, head_cuts, local_block, writers
from llmopt.partition.runtime.layout import Layout, Seat


class Peers(Protocol):
    """The ranks of one stage, this one among them."""

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over the ranks; may take the place of `values`."""
        ...


@dataclass(slots=True)
class DecoderState:
    """What a stage remembers of some sequences: the caches of its blocks, and how many tokens it has seen."""

    caches: list[KvCache]
    length: int = 0


class DecoderStage:
    """Blocks of a `ModelSpec`, with the embedding in front and the head behind where the layout says so.

    Args:
        weights: by name, cut as `DecoderStage.cuts` says.
        peers: whom to add up with.
        capacity: tokens that a sequence may come to have.
        linears: how the linears of a part are applied, given its weights.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        seat: Seat,
        weights: Weights,
        peers: Peers,
        *,
        capacity: int,
        device: torch.device,
        linears: Callable[[Weights], Apply] = plain,
    ) -> None:
        self.spec = spec
        self.share, self.blocks = _held(spec, layout, seat)
        self.local = [local_block(block, self.share) for block in self.blocks]
        self.first, self.last = seat.stage == 0, seat.stage == len(layout.stages) - 1
        self._weights, self._peers, self._device = weights, peers, device
        self.dtype = next(iter(weights.values())).dtype
        self._tables = RotaryTables(spec, capacity)
        self._capacity = capacity
        plainly = linears(weights)
        self._head = plainly
        self._apply = self._adding_up(plainly) if self.share.degree > 1 else plainly

    @staticmethod
    def cuts(spec: ModelSpec, layout: Layout, seat: Seat) -> Iterator[Cut]:
        """What the rank at `seat` reads, each tensor once: a tied table serves a stage with both its ends."""
        share, blocks = _held(spec, layout, seat)
        found: dict[str, Cut] = {}
        if seat.stage == 0:
            found |= {cut.tensor.name: cut for cut in embedding_cuts(spec, share)}
        found |= {cut.tensor.name: cut for block in blocks for cut in block_cuts(block, share)}
        if seat.stage == len(layout.stages) - 1:
            found |= {cut.tensor.name: cut for cut in head_cuts(spec, share)}
        yield from found.values()

    @property
    def width(self) -> int:
        """Channels of the hidden states that stages exchange."""
        return self.spec.hidden_size

    @property
    def vocabulary(self) -> tuple[int, int]:
        """Which tokens the logits of this rank are for: the first, and the one behind the last."""
        return self.share.of(self.spec.vocab_size)

    def state(self, batch: int) -> DecoderState:
        """Nothing seen yet of so many sequences."""
        return DecoderState(
            [self._cache(block.attention.kv_heads, block.attention.head_dim, batch) for block in self.local]
        )

    def forward(self, inputs: Tensor, state: DecoderState, advance: Callable[[], None]) -> Tensor:
        """Hidden states [B, T, H] behind this stage, of ids [B, T] or hidden states; see `logits` for what follows.

        `advance` is called as each block is done.
        """
        start = state.length
        state.length += inputs.shape[1]
        hidden_BTH = self._embed(inputs, start) if self.first else inputs
        for block, cache in zip(self.local, state.caches, strict=True):
            turn = self._tables.turn(block, start, state.length)
            turn = None if turn is None else (turn[0].to(hidden_BTH), turn[1].to(hidden_BTH))
            hidden_BTH = block_forward(block, self._weights, hidden_BTH, turn, apply=self._apply, cache=cache)
            advance()
        return hidden_BTH

    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """Logits [B, V'] behind the last token, of this rank's part of the vocabulary."""
        return head_logits(self.spec, self._weights, hidden_BTH[:, -1:], apply=self._head)[:, 0]

    def _cache(self, heads: int, channels: int, batch: int) -> KvCache:
        def room() -> Tensor:
            return torch.zeros((batch, heads, self._capacity, channels), dtype=self.dtype, device=self._device)

        return KvCache(room(), room())

    def _embed(self, ids_BT: Tensor, start: int) -> Tensor:
        embedding = self.spec.embedding
        table_VH = self._weights[f"{embedding.name}.weight"]
        if self.share.degree == 1:
            hidden_BTH = functional.embedding(ids_BT, table_VH)
        else:
            first, stop = self.vocabulary
            mine_BT = (ids_BT >= first) & (ids_BT < stop)
            rows_BTH = functional.embedding((ids_BT - first) * mine_BT, table_VH)
            hidden_BTH = self._peers.add_up(rows_BTH * mine_BT[..., None])
        hidden_BTH = hidden_BTH * embedding.scale
        if embedding.positions is not None:
            first = start + embedding.positions.offset
            rows_TH = self._weights[f"{embedding.positions.name}.weight"][first : first + ids_BT.shape[1]]
            hidden_BTH = hidden_BTH + rows_TH
        return hidden_BTH

    def _adding_up(self, apply: Apply) -> Apply:
        biases = {linear.name: linear.bias for block in self.blocks for linear in writers(block)}

        def apply_and_add(linear: Linear, x: Tensor) -> Tensor:
            y = apply(linear, x)
            if linear.name not in biases:
                return y
            y = self._peers.add_up(y)
            return y + self._weights[f"{linear.name}.bias"] if biases[linear.name] else y

        return apply_and_add


def _held(spec: ModelSpec, layout: Layout, seat: Seat) -> tuple[Share, tuple[Block, ...]]:
    stage = layout.stages[seat.stage]
    return Share(seat.index, stage.degree), spec.blocks[stage.first : stage.stop]
