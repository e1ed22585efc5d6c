"""Safetensors files whose headers are written first, so that tensors can follow one at a time.

Layout: eight bytes with the size of the header, the header in JSON, then the tensors without gaps. Within a file those
with the larger elements come first, as the safetensors package has it: so each is aligned to its elements.
https://huggingface.co/docs/safetensors/index#format
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedWriter
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from llmopt.artifact import write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # what transformers long wrote into one file, and hosts and downloads bear well

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
}
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that a file is to hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """What its values take."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Place:
    entry: Entry
    file: BufferedWriter
    offset: int


class SafetensorsFiles:
    """The files of a checkpoint in `folder`. Give each entry its values with `write`, in any order; then `save`.

    Use `close` whatever happens. `said` is what headers say besides.
    """

    def __init__(
        self,
        folder: Path,
        entries: Iterable[Entry],
        shard_bytes: float = SHARD_BYTES,
        said: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._said = dict(said or {})
        self._shards = _named(shards(entries, shard_bytes))
        self._places: dict[str, _Place] = {}
        self._stack = ExitStack()
        for name, shard in self._shards.items():
            self._open(name, shard)
        self._left = set(self._places)

    def _open(self, name: str, shard: Sequence[Entry]) -> None:
        ordered = sorted(shard, key=lambda entry: -entry.dtype.itemsize)
        file = self._stack.enter_context((self._folder / name).open("wb"))
        file.write(_header(ordered, self._said))
        offset = file.tell()
        for entry in ordered:
            self._places[entry.name] = _Place(entry, file, offset)
            offset += entry.size_bytes

    def write(self, name: str, values: Tensor) -> None:
        """Put a tensor in its place."""
        place = self._places[name]
        assert (values.dtype, tuple(values.shape)) == (place.entry.dtype, place.entry.shape), name
        self._left.remove(name)
        place.file.seek(place.offset)
        place.file.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def save(self) -> None:
        """See that every tensor was written, and write the index of several files."""
        assert not self._left, f"{min(self._left)} was never written"
        if len(self._shards) > 1:
            total = sum(place.entry.size_bytes for place in self._places.values())
            weight_map = {entry.name: name for name, shard in self._shards.items() for entry in shard}
            write_json(self._folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


def shards(entries: Iterable[Entry], shard_bytes: float) -> list[list[Entry]]:
    """Entries in their order, cut before a file would have more than `shard_bytes`; a larger one has its own."""
    found: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if found[-1] and size + entry.size_bytes > shard_bytes:
            found.append([])
            size = 0
        found[-1].append(entry)
        size += entry.size_bytes
    return found


def _named(found: Sequence[list[Entry]]) -> dict[str, list[Entry]]:
    if len(found) == 1:
        return {SINGLE: found[0]}
    count = len(found)
    return {f"model-{index:05d}-of-{count:05d}.safetensors": shard for index, shard in enumerate(found, start=1)}


def _header(ordered: Sequence[Entry], said: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt", **said}}  # transformers asks for the format
    offset = 0
    for entry in ordered:
        end = offset + entry.size_bytes
        content[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
