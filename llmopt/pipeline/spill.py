"""Activations of many windows: in memory up to a limit, and beyond it in a file that has no name.

The system frees such a file when the process lets it go or ends, however it ends, so there is nothing to clear up. It
is read and written, not mapped: pages of a map count as resident memory, and where a full disk is an error of a write,
it kills a process that touches a map.
"""

import errno
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmopt.errors import ResourceError
from llmopt.measure.memory import available_bytes


def limit_bytes() -> int:
    """What is to be in memory of one list: two are in use at a time, and have a quarter of what is available."""
    return available_bytes() // 8


class States:
    """A list of float32 tensors that keep their shapes; those past the limit are in a file in `folder`.

    What is taken out is in memory, as it was put in to the last bit. It is changed by putting it in again.

    Raises:
        ResourceError: on putting in, the disk is full.
    """

    def __init__(self, limit: int = sys.maxsize, folder: Path | None = None) -> None:
        self._left = limit
        self._folder = folder
        self._file: FileIO | None = None
        self._end = 0
        self._kept: list[Tensor | tuple[int, torch.Size]] = []  # a tensor, or where in the file it is, and its shape

    def extend(self, tensors: Iterable[Tensor]) -> None:
        """Put tensors behind the last."""
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: Tensor) -> None:
        """Put a tensor behind the last."""
        assert tensor.dtype == torch.float32
        if tensor.nbytes <= self._left:
            self._left -= tensor.nbytes
            self._kept.append(tensor)
            return
        self._left = 0  # a later one that is smaller is no exception
        self._kept.append((self._end, tensor.shape))
        self._end += tensor.nbytes
        self[len(self._kept) - 1] = tensor

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept[index]
        if isinstance(kept, Tensor):
            return kept
        start, shape = kept
        tensor = torch.empty(shape)
        file, left = self._opened(), _bytes_of(tensor)
        file.seek(start)
        while left:
            count = file.readinto(left)
            assert count, "what was put in is there"
            left = left[count:]
        return tensor

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        kept = self._kept[index]
        if isinstance(kept, Tensor):
            self._kept[index] = tensor
            return
        start, shape = kept
        assert tensor.shape == shape
        try:
            file, left = self._opened(), _bytes_of(tensor)
            file.seek(start)
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            raise ResourceError(
                f"the disk is full, and memory has no room for {self._end / 1e6:,.0f} MB of activations",
                where=None if self._folder is None else str(self._folder.parent),
                hint="free some space, or give fewer --calib-tokens",
            ) from error

    def _opened(self) -> FileIO:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 (open as long as this is)
            weakref.finalize(self, self._file.close)
        return self._file


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().reshape(-1).view(np.uint8).data
