"""Where a tensor's bytes lie, whatever the format of the file around them."""

import math
import os
from dataclasses import KW_ONLY, dataclass
from io import FileIO
from pathlib import Path

from llmopt.errors import ModelError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """`size_bytes` bytes at `offset` of `file`; rows follow each other, the last axis varies fastest.

    `dtype` is the format's own word: `BF16` in safetensors, `Q4_K` in GGUF.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    _: KW_ONLY
    file: Path
    offset: int
    size_bytes: int

    @property
    def rows(self) -> int:
        """Length of the first axis of a table; a vector or a scalar is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_values(self) -> int:
        """Values in one row."""
        return math.prod(self.shape) // self.rows

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.size_bytes // self.rows


class OpenFiles:
    """Byte ranges of files that stay open between reads. Plain reads: mapped pages would count as resident memory."""

    def __init__(self) -> None:
        self._files: dict[str, FileIO] = {}

    def fill(self, wanted: memoryview, stored: StoredTensor, skip: int = 0) -> None:
        """Read as many bytes of a tensor as there is room for, behind the first `skip` of them.

        Raises:
            ModelError: the file cannot be opened, or ends before the tensor does.
        """
        key = str(stored.file)
        if key not in self._files:
            self._files[key] = open_file(stored.file)
        file = self._files[key]
        file.seek(stored.offset + skip)
        while wanted:
            count = file.readinto(wanted)  # at most 2 GiB at a time
            if not count:
                raise damaged(f"{stored.name} is cut off", stored.file)
            wanted = wanted[count:]

    def close(self) -> None:
        """Close the files. Reading again opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def file_size(path: Path) -> int:
    """Size in bytes.

    Raises:
        ModelError: the file cannot be opened.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


def open_file(path: Path) -> FileIO:
    """Open for reading plain bytes, without a buffer: what is read here is large.

    Raises:
        ModelError: the file cannot be opened.
    """
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise unreadable(path, error) from error


def damaged(what: str, where: Path) -> ModelError:
    """The error for a file that is not what it says it is."""
    return ModelError(what, where=str(where), hint="the file is damaged or not fully downloaded: get it again")


def unreadable(path: Path, error: OSError) -> ModelError:
    """The error for a file that the operating system does not let us read."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return ModelError(f"cannot read the file: {reason}", where=str(path))
