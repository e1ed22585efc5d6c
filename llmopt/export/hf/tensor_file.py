"""A safetensors file whose header is written before any tensor is there, so that tensors can come one at a time.

Layout: eight bytes with the size of the header, the header in JSON, then the tensors without gaps.
https://huggingface.co/docs/safetensors/index#format
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_WORDS = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
}
_ALIGNMENT = 8  # of the first tensor, in bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """What a tensor will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """What its values take."""
        return self.dtype.itemsize * prod(self.shape)


class TensorFile:
    """Tensors by name, written in any order; where each lies depends on the entries alone."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        header, offsets = layout(entries)
        self._offsets = {name: len(header) + offset for name, offset in offsets.items()}
        self._missing = set(entries)
        self._file = path.open("wb")
        self._file.write(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place, once."""
        entry = self._entries[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), name
        self._missing.remove(name)
        self._file.seek(self._offsets[name])
        self._file.write(memoryview(tensor.contiguous().view(torch.uint8).numpy().reshape(-1)))

    def finish(self) -> None:
        """See that nothing is missing, and have everything written."""
        assert not self._missing, sorted(self._missing)
        self._file.flush()

    def close(self) -> None:
        """Let the file go, whatever is in it."""
        self._file.close()


def layout(entries: Mapping[str, Entry]) -> tuple[bytes, dict[str, int]]:
    """The header with its size before it, and where each tensor begins behind it, in bytes.

    The widest values come first, so that each tensor is aligned; among equals names decide.
    """
    offsets, header, end = {}, {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name)):
        entry = entries[name]
        offsets[name], end = end, end + entry.size_bytes
        header[name] = {
            "dtype": _WORDS[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offsets
