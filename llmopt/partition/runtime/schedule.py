"""Greedy generation over stages: micro-batches follow each other through them, and token ids come back.

Prompts are cut into micro-batches, by sequences, by tokens, or by both. A stage computes one while the next computes
the one before; the last stage chooses a token and tells the first. So is every token after it, without cuts by tokens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from llmopt.errors import UsageError
from llmopt.partition.runtime.trace import Trace
from llmopt.partition.runtime.wire import Wire


class Stage(Protocol):
    """The part of a model that a rank holds. See `DecoderStage` for what each of these means."""

    first: bool
    last: bool
    dtype: torch.dtype

    @property
    def width(self) -> int: ...  # noqa: D102 (said there)
    @property
    def vocabulary(self) -> tuple[int, int]: ...  # noqa: D102
    def state(self, batch: int) -> Any: ...  # noqa: D102
    def forward(self, inputs: Tensor, state: Any, advance: Callable[[], None]) -> Tensor: ...  # noqa: D102
    def logits(self, hidden_BTH: Tensor) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatches:
    """Into how many parts a batch is cut: its sequences, and the tokens of its prompts."""

    sequences: int = 1
    tokens: int = 1

    @property
    def count(self) -> int:
        """Micro-batches of a prefill."""
        return self.sequences * self.tokens


WHOLE = MicroBatches()


def micro_batches(count: int, batch: int, prompt: int) -> MicroBatches:
    """So many micro-batches: of whole sequences as far as there are enough, and else of parts of prompts.

    Raises:
        UsageError: neither gives as many.
    """
    if count <= batch:
        return MicroBatches(sequences=count)
    if count <= prompt:
        return MicroBatches(tokens=count)
    raise UsageError(
        f"{count} micro-batches of {batch} × {prompt} tokens", hint=f"at most {max(batch, prompt)} are not empty"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What a rank has of a generation: one of the first stage the new tokens, [B, T], and when each of them was there,
    in seconds from the start; one of the last stage its part of the vocabulary's logits, if they were asked for.
    """

    ids_BT: Tensor | None
    ended_s: tuple[float, ...]
    logits_BTV: Tensor | None


class Pipeline:
    """One rank's share of a generation; made alike on all ranks."""

    def __init__(self, stage: Stage, wire: Wire, trace: Trace) -> None:
        self._stage, self._wire, self._trace = stage, wire, trace
        self._keep_logits = False

    def generate(self, ids_BT: Tensor, output: int, cut: MicroBatches, *, keep_logits: bool = False) -> Generated:
        """The `output` likeliest tokens behind prompts of one length, [B, T] on the rank's device."""
        self._keep_logits = keep_logits
        start = time.perf_counter()
        groups = [_Group(ids_BT[first:stop], self._stage) for first, stop in _ends(len(ids_BT), cut.sequences)]
        for group in groups:
            for first, stop in _ends(group.prompt_BT.shape[1], cut.tokens):
                self._pass(group, group.prompt_BT[:, first:stop], last=stop == group.prompt_BT.shape[1])
        for _ in range(output - 1):
            self._trace.begin()
            for group in groups:
                self._pass(group, self._come_back(group), last=True)
        for group in groups:
            self._come_back(group)
        self._wire.flush()
        kept = [torch.stack(group.logits, 1) for group in groups if group.logits]
        return Generated(
            ids_BT=torch.cat([torch.stack(group.tokens, 1) for group in groups]) if self._stage.first else None,
            ended_s=tuple(max(ended) - start for ended in zip(*(group.ended_s for group in groups), strict=True)),
            logits_BTV=torch.cat(kept) if kept else None,
        )

    def _pass(self, group: "_Group", ids_BT: Tensor, *, last: bool) -> None:
        """One micro-batch through this stage; behind the last of a prompt, or a token, comes the next token."""
        inputs = ids_BT
        if not self._stage.first:
            inputs = self._wire.receive((*ids_BT.shape, self._stage.width), self._stage.dtype, self._wire.stage - 1)
        with self._trace.busy():
            hidden_BTH = self._stage.forward(inputs, group.state, self._trace.advance)
            if self._stage.last and last:
                group.chosen = self._choose(hidden_BTH, group)
        if not self._stage.last:
            self._wire.send(hidden_BTH, self._wire.stage + 1)
        elif last and not self._stage.first:
            self._wire.send(group.chosen, 0)

    def _come_back(self, group: "_Group") -> Tensor:
        """The tokens chosen last, [B, 1], where they are embedded; elsewhere something of that shape."""
        if not self._stage.first:
            return group.prompt_BT[:, :1]
        if not self._stage.last:
            group.chosen = self._wire.receive(group.chosen.shape, torch.int64, self._wire.stages - 1)
        group.tokens.append(group.chosen)
        group.ended_s.append(time.perf_counter())
        return group.chosen[:, None]

    def _choose(self, hidden_BTH: Tensor, group: "_Group") -> Tensor:
        """The likeliest tokens, [B]; the first of those that are alike."""
        logits_BV = self._stage.logits(hidden_BTH)
        if self._keep_logits:
            group.logits.append(logits_BV)
        best_B, ids_B = logits_BV.max(-1)
        best_RB, ids_RB = self._wire.gather(best_B), self._wire.gather(ids_B + self._stage.vocabulary[0])
        return ids_RB.gather(0, best_RB.argmax(0, keepdim=True))[0]


class _Group:
    """Sequences that go through the stages together: their prompts [B, T], and what has come of them."""

    def __init__(self, prompt_BT: Tensor, stage: Stage) -> None:
        self.prompt_BT = prompt_BT
        self.state = stage.state(len(prompt_BT))
        self.chosen = torch.empty(len(prompt_BT), dtype=torch.int64, device=prompt_BT.device)
        self.tokens: list[Tensor] = []
        self.ended_s: list[float] = []
        self.logits: list[Tensor] = []


def _ends(size: int, parts: int) -> list[tuple[int, int]]:
    return list(pairwise(size * part // parts for part in range(parts + 1)))
