"""A checkpoint in torch, float32 on the CPU: the reference engine, slow and obviously right."""

from collections.abc import Callable, Iterable
from typing import Protocol

import psutil
import torch
from torch import Tensor

from llmopt.engine.base import Logits, TokenIds
from llmopt.engine.blocks import Apply, KvCache, RotaryTables, Weights, block_forward, embed, head_logits, plain
from llmopt.errors import UsageError
from llmopt.model.spec import ModelSpec, TensorSpec

_FLOAT32_BYTES = 4
_MEMORY_SHARE = 0.5  # of what is free now; activations, logits and other programs need room too


class Tensors(Protocol):
    """Where weights come from: a checkpoint, or something that looks like one (dequantized weights)."""

    def read(self, tensor: TensorSpec) -> Tensor:
        """One tensor, float32, in its stored shape."""
        ...


class TorchEngine:
    """A model described by `spec` with the weights in `tensors`; satisfies `llmopt.engine.base.Engine`.

    `keep` says whether weights stay in memory once they were read; None keeps them if half of the free memory holds
    them all. Otherwise one block is in memory at a time, and every call reads the checkpoint anew.
    `linears` says how the linears of a part are applied, given its weights.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Tensors,
        *,
        keep: bool | None = None,
        linears: Callable[[Weights], Apply] = plain,
    ) -> None:
        self.spec = spec
        self.name = f"torch {torch.__version__}"
        self.vocab_size = spec.vocab_size
        self._tensors = tensors
        self._linears = linears
        self._keep = fits_in_memory(spec) if keep is None else keep
        self._kept: dict[str, Tensor] = {}

    def logits(self, ids_BT: TokenIds) -> Logits:
        """Logits at every position, [batch, tokens, vocab_size].

        Raises:
            UnsupportedError: the model cannot read that many tokens.
        """
        with torch.inference_mode():
            hidden_BTH = self.hidden(torch.from_numpy(ids_BT), RotaryTables(self.spec, ids_BT.shape[1]))
            return self.head(hidden_BTH).numpy()

    def logits_behind(self, ids_BT: Tensor, first: int) -> Tensor:
        """Logits behind the tokens from number `first` on, [batch, tokens - first, vocab_size].

        Raises:
            UnsupportedError: the model cannot read that many tokens.
        """
        hidden_BTH = self.hidden(ids_BT, RotaryTables(self.spec, ids_BT.shape[1]))
        return self.head(hidden_BTH[:, first:])

    def stream(self, capacity: int) -> "TorchStream":
        """An empty sequence with room for `capacity` tokens; keeps the weights in memory from now on.

        Raises:
            UnsupportedError: the model cannot read that many tokens.
        """
        self._keep = True
        return TorchStream(self, capacity)

    def hidden(self, ids_BT: Tensor, tables: RotaryTables, caches: list[KvCache] | None = None) -> Tensor:
        """Hidden states behind the last block, [B, T, H]. With `caches`, one a block, the tokens follow those there."""
        start = caches[0].length if caches else 0
        embedding = self.spec.embedding
        hidden_BTH = embed(embedding, self._read(embedding.tensors()), ids_BT, start)
        for block in self.spec.blocks:
            weights = self._read(block.tensors())
            turn = tables.turn(block, start, start + ids_BT.shape[1])
            cache = caches[block.index] if caches else None
            hidden_BTH = block_forward(block, weights, hidden_BTH, turn, apply=self._linears(weights), cache=cache)
        return hidden_BTH

    def head(self, hidden_BTH: Tensor) -> Tensor:
        """Logits, [B, T, V], from what `hidden` gives."""
        head = self.spec.head
        bias = () if not head.bias else (TensorSpec(f"{head.name}.bias", (head.out_features,)),)
        weights = self._read((*self.spec.tensors_before_head(), head.weight, *bias))
        return head_logits(self.spec, weights, hidden_BTH, apply=self._linears(weights))

    def _read(self, tensors: Iterable[TensorSpec]) -> Weights:
        part: dict[str, Tensor] = {}
        for tensor in tensors:
            kept = self._kept.get(tensor.name)
            part[tensor.name] = self._tensors.read(tensor) if kept is None else kept
        if self._keep:
            self._kept.update(part)
        return part


class TorchStream:
    """One sequence with its KV cache; satisfies `llmopt.engine.base.Stream`."""

    def __init__(self, engine: TorchEngine, capacity: int) -> None:
        self._engine = engine
        self._capacity = capacity
        self._tables = RotaryTables(engine.spec, capacity)
        self._caches = [KvCache.empty(block.attention, 1, capacity) for block in engine.spec.blocks]

    def feed(self, ids_T: TokenIds) -> Logits:
        """Append tokens, [T], and give the logits behind the last one, [vocab_size].

        Raises:
            UsageError: the sequence grows past its capacity.
        """
        if self._caches[0].length + len(ids_T) > self._capacity:
            raise UsageError(f"the sequence has room for {self._capacity} tokens", hint="open it with more capacity")
        with torch.inference_mode():
            hidden_BTH = self._engine.hidden(torch.from_numpy(ids_T)[None], self._tables, self._caches)
            return self._engine.head(hidden_BTH[:, -1:])[0, 0].numpy()


def fits_in_memory(spec: ModelSpec) -> bool:
    """Whether half of the memory that is free now holds all weights as float32."""
    needed = sum(tensor.count for tensor in spec.tensors()) * _FLOAT32_BYTES
    return bool(needed <= psutil.virtual_memory().available * _MEMORY_SHARE)
