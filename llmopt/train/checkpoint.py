"""A run in pieces on the disk: all that it goes on from, to the last bit.

Tensors are safetensors, all else is JSON; nothing is pickled. The pieces of a checkpoint are written first and its
index last, so one that a dying process left half done is not seen; the one before it goes when the index is there.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from llmopt.artifact import Journal
from llmopt.train.divided import like, whole

PIECE_BYTES = 2**27  # a piece is made in memory before it is written


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Tensors by name, and what else there is, as JSON has it."""

    tensors: Mapping[str, Tensor]
    told: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run in a journal, where they are called `name`; the last one is kept."""

    def __init__(self, journal: Journal, name: str = "training") -> None:
        self.journal = journal
        self.name = name
        self._index = re.compile(rf"{re.escape(name)}-(\d+)\.json")

    def write(self, step: int, snapshot: Snapshot) -> None:
        """Keep the state behind a step, in place of the last one."""
        before = [name for name in self.journal.names() if name.startswith(f"{self.name}-")]
        pieces = []
        for number, piece in enumerate(_pieces(snapshot.tensors)):
            pieces.append(f"{self.name}-{step}.{number}.safetensors")
            self.journal.write(pieces[-1], safetensors.torch.save(piece))
        index = f"{self.name}-{step}.json"
        self.journal.write(index, json.dumps({"pieces": pieces, "told": snapshot.told}).encode())
        for name in sorted(set(before) - {index, *pieces}, key=self._is_piece):  # an index goes before what it names
            self.journal.remove(name)

    def read(self) -> tuple[int, Snapshot] | None:
        """The last checkpoint that is whole, and its step; None if there is none."""
        for step in sorted(self.steps(), reverse=True):
            found = self._read(step)
            if found is not None:
                return step, found
        return None

    def steps(self) -> list[int]:
        """Of the checkpoints that there are."""
        return [int(match[1]) for name in self.journal.names() if (match := self._index.fullmatch(name))]

    def _read(self, step: int) -> Snapshot | None:
        index = self.journal.read(f"{self.name}-{step}.json")
        if index is None:
            return None
        found = json.loads(index)
        tensors: dict[str, Tensor] = {}
        for name in found["pieces"]:
            piece = self.journal.read(name)
            if piece is None:
                return None
            # Cloned into torch's own memory: arithmetic may round differently where a tensor begins elsewhere.
            tensors |= {key: tensor.clone() for key, tensor in safetensors.torch.load(piece).items()}
        return Snapshot(tensors, found["told"])

    def _is_piece(self, name: str) -> bool:
        return self._index.fullmatch(name) is None


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    piece: dict[str, Tensor] = {}
    size_bytes = 0
    for name, tensor in tensors.items():
        if piece and size_bytes + tensor.nbytes > PIECE_BYTES:
            yield piece
            piece, size_bytes = {}, 0
        piece[name] = whole(tensor.detach()).contiguous()
        size_bytes += tensor.nbytes
    yield piece


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """What an optimizer remembers, by names behind a prefix; all of it is tensors."""
    found = {}
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            found[f"{prefix}{number}:{key}"] = value
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Have an optimizer remember what `optimizer_tensors` gave; its rates are not part of that."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name in tensors:
        if name.startswith(prefix):
            number, _, key = name.removeprefix(prefix).partition(":")
            state.setdefault(int(number), {})[key] = like(tensors[name], parameters[int(number)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
