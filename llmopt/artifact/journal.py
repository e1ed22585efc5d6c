"""Progress that outlives its process: finished pieces of work, kept beside the output until that is whole.

The journal of `NAME` is the folder `.NAME.llmopt-journal`. Its `key` says what decides the bytes of the work: pieces of
other work are thrown away, not taken for those of this one. A piece is a file and a seal, which holds the file's size
and hash and is written when the file is on the disk; so a piece that was torn, or damaged later, is seen to be, and
counts as one that is not there.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

from llmopt.errors import ArtifactError, UsageError
from llmopt.progress import Progress

_KEY = "key"
_SEAL = ".seal.json"
_PARTIAL = ".partial"


class Resume(Enum):
    """What is to become of the journal that an earlier run left."""

    IF_SAME = "if it is of the same work"
    REQUIRED = "it has to be there, and of the same work"
    NEVER = "it is thrown away"


class Journal:
    """The pieces in a folder that this process has locked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str) -> bool:
        """Whether a piece was finished; `read` says whether it still is what was written."""
        return (self.folder / (name + _SEAL)).exists()

    def read(self, name: str) -> bytes | None:
        """A piece; None if it was not finished, or is not what was written."""
        try:
            data = (self.folder / name).read_bytes()
            seal = (self.folder / (name + _SEAL)).read_bytes()
        except FileNotFoundError:
            return None
        return data if seal == _seal(data) else None

    def write(self, name: str, data: bytes) -> None:
        """Keep a piece: on the disk when this returns."""
        self._put(name, data)
        self._put(name + _SEAL, _seal(data))

    def names(self) -> list[str]:
        """The pieces that were finished."""
        return sorted(path.name.removesuffix(_SEAL) for path in self.folder.glob("*" + _SEAL))

    def remove(self, name: str) -> None:
        """Throw a piece away; its seal first, for without one it is none."""
        (self.folder / (name + _SEAL)).unlink(missing_ok=True)
        (self.folder / name).unlink(missing_ok=True)

    def _put(self, name: str, data: bytes) -> None:
        partial = self.folder / (name + _PARTIAL)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / name)
        _fsync(self.folder)

    def clear(self) -> None:
        """Throw everything away."""
        # The key last: without it, what a process that dies in here leaves would be of unknown work.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == _KEY):
            path.unlink()

    def begin(self, key: str) -> None:
        """Say what the pieces to come are of."""
        for path in self.folder.glob("*" + _PARTIAL):
            path.unlink()
        if self.key() != key:
            self._put(_KEY, key.encode())

    def key(self) -> str | None:
        """What the pieces are of; None if there are none."""
        try:
            return (self.folder / _KEY).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    @property
    def is_empty(self) -> bool:
        """Whether no piece was finished."""
        return not any(self.folder.glob("*" + _SEAL))


def journal_folder(output: Path) -> Path:
    """Where the journal of `output` is, if it has one."""
    output = Path(os.path.realpath(output))
    return output.with_name(f".{output.name}.llmopt-journal")


def journal_bytes(output: Path) -> int:
    """What the journal of `output` takes on the disk; 0 if there is none."""
    with suppress(FileNotFoundError):  # there is none, or it is just being removed
        return sum(path.stat().st_size for path in journal_folder(output).iterdir())
    return 0


@contextmanager
def journal(output: Path, key: str, resume: Resume, progress: Progress) -> Iterator[Journal]:
    """The journal of `output`, which goes when the block ends without an exception, and stays when it does not.

    Raises:
        UsageError: there is none of this work, and there has to be.
        ArtifactError: another process has it.
    """
    folder = journal_folder(output)
    if resume is Resume.REQUIRED and not folder.is_dir():
        raise UsageError("there is no journal to resume from", where=str(folder), hint="leave --resume out")
    with _locked(folder, output):
        kept = Journal(folder)
        try:
            _settle(kept, key, resume, progress)
            yield kept
            shutil.rmtree(folder)
        finally:
            # What failed before there was anything to keep leaves nothing behind.
            if folder.exists() and kept.is_empty:
                shutil.rmtree(folder, ignore_errors=True)


def discard_journal(output: Path, progress: Progress) -> None:
    """Throw away the journal of other work that an earlier run left, if there is one.

    Raises:
        ArtifactError: another process has it.
    """
    folder = journal_folder(output)
    if folder.is_dir():
        with _locked(folder, output):
            progress.say(f"{folder} is of other work: thrown away")
            shutil.rmtree(folder)


def _settle(kept: Journal, key: str, resume: Resume, progress: Progress) -> None:
    found = kept.key()
    if resume is Resume.REQUIRED and found != key:
        raise UsageError(
            "the journal is not of this command: its model, text, options or versions differ",
            where=str(kept.folder),
            hint="give the same options as before, or --restart",
        )
    if resume is Resume.NEVER or found != key:
        if resume is Resume.IF_SAME and not kept.is_empty:
            progress.say(f"{kept.folder} is of other work: thrown away, and begun again")
        kept.clear()
    kept.begin(key)


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    descriptor = _lock(folder, output)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, output: Path) -> int:
    """A descriptor that holds the lock of a folder, which is made if need be. It ends with the process, however."""
    while True:
        folder.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # the process that had it has just finished, and removed it
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), folder.stat()):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise ArtifactError(
                    "another llmopt is writing this output just now",
                    where=str(output),
                    hint="wait for it, or name another output",
                ) from None
            except FileNotFoundError:
                pass
            os.close(descriptor)


def _seal(data: bytes) -> bytes:
    return json.dumps({"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}).encode()


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
