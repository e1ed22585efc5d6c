"""A folder that appears whole or not at all.

It is written under a hidden name beside its final one, `.NAME.llmopt-HOST-PID.partial`, and renamed when it is done.
With `force`, the folder that stood there is called `.NAME.llmopt-HOST-PID.replaced` for the moment between the two
renames. A process that died leaves such names behind; the next one that writes to the same place puts a replaced
folder back, or removes what is of no use.
"""

import errno
import os
import re
import shlex
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from llmopt.artifact.manifest import MANIFEST, MODEL_CARD, REPORT, read_manifest
from llmopt.errors import ArtifactError, ResourceError

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def staged(output: Path, *, force: bool) -> Iterator[Path]:
    """An empty folder to write into, which becomes `output` when the block ends without an exception.

    Args:
        output: the final place; its parent exists, and it does not exist itself unless `force`.
        force: replace what stands there, if that is an artifact that nobody added files to, or an empty folder.

    Raises:
        ArtifactError: `output` may not be written, which is raised before the block runs; or something came to stand
            there while it ran.
        ResourceError: the disk is full.
    """
    output = check_destination(output, force=force)
    folder, replaced = _hidden(output, "partial"), _hidden(output, "replaced")
    try:
        folder.mkdir()
        yield folder
        _flush(folder)
        _check_still_free(output, force=force)
        _put_in_place(folder, output, replaced)
    except OSError as error:
        if error.errno in _DISK_IS_FULL:
            raise ResourceError("the disk is full", where=str(output), hint="free some space") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_destination(output: Path, *, force: bool) -> Path:
    """Make sure that an artifact may be written to `output`, and give its real, absolute path.

    Raises:
        ArtifactError: something stands there, or its parent does not exist, cannot be written to, or is an artifact.
    """
    output = Path(os.path.realpath(output))
    parent = output.parent
    if parent.exists() and not parent.is_dir():
        raise ArtifactError(
            "what is to be the folder to write into is no folder", where=str(parent), hint="name another output"
        )
    if not parent.is_dir():
        raise ArtifactError(
            "the folder to write into does not exist", where=str(parent), hint=f"mkdir -p {shlex.quote(str(parent))}"
        )
    _check_outside_artifacts(output)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ArtifactError("the folder to write into is not writable", where=str(parent))
    _clear_up_after_the_dead(output)
    if os.path.lexists(output):
        _check_replaceable(output)
        if not force:
            raise ArtifactError("the output exists already", where=str(output), hint="--force replaces it")
    return output


def _check_still_free(output: Path, *, force: bool) -> None:
    """What others put there in the meantime is theirs."""
    if not os.path.lexists(output):
        return
    if not force:
        raise ArtifactError(
            "another process wrote the output in the meantime, which is kept",
            where=str(output),
            hint="name another output, or --force to replace it",
        )
    _check_replaceable(output)


def _hidden(output: Path, state: str) -> Path:
    return output.with_name(f".{output.name}.llmopt-{socket.gethostname()}-{os.getpid()}.{state}")


def _clear_up_after_the_dead(output: Path) -> None:
    # Process ids mean something on one host only: what another host left beside ours, on a shared disk, is not touched.
    host = re.escape(socket.gethostname())
    name = re.compile(rf"\.{re.escape(output.name)}\.llmopt-{host}-(?P<pid>\d+)\.(?P<state>partial|replaced)")
    for entry in sorted(output.parent.iterdir()):
        match = name.fullmatch(entry.name)
        if match is None or _is_alive(int(match["pid"])):
            continue
        if match["state"] == "replaced" and not os.path.lexists(output):
            entry.rename(output)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    # Containers give the same small numbers again: a leftover with our own number is not ours, we have just begun.
    return pid != os.getpid() and psutil.pid_exists(pid)


def _check_outside_artifacts(output: Path) -> None:
    """What stands inside an artifact would be lost, or in the way, when that one is written again."""
    artifact = next((folder for folder in output.parents if (folder / MANIFEST).is_file()), None)
    if artifact is not None:
        raise ArtifactError(
            "the output lies inside another artifact", where=str(artifact), hint="name a folder beside it"
        )


def _check_replaceable(output: Path) -> None:
    if not output.is_dir():
        raise ArtifactError("the output exists and is not a folder", where=str(output), hint="name another output")
    if Path.cwd().is_relative_to(output):
        raise ArtifactError("the output is the working folder", where=str(output), hint="name a folder inside it")
    present = {path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir()}
    if not present and not any(output.iterdir()):
        return
    if MANIFEST not in present:
        raise ArtifactError(
            "the output is a folder that llmopt did not write; it will not be replaced",
            where=str(output),
            hint="name another output, or remove it yourself",
        )
    strangers = sorted(present - {MANIFEST, REPORT, MODEL_CARD, *read_manifest(output).files})
    if strangers:
        raise ArtifactError(
            f"the output holds a file that llmopt did not write: {strangers[0]}",
            where=str(output),
            hint="move it away, or name another output",
        )


def _flush(folder: Path) -> None:
    """Have everything on the disk before the rename is: a power cut must not leave a whole name on half a file."""
    for path in folder.rglob("*"):
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(folder: Path, output: Path, replaced: Path) -> None:
    if os.path.lexists(output):
        output.rename(replaced)
    try:
        folder.rename(output)
    except BaseException:
        if replaced.exists():
            replaced.rename(output)
        raise
    _fsync(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)
