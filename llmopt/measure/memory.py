"""The memory that this process holds, ever held, and may still have."""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process since it started its program; None where the system does not tell.

    Linux's own high-water mark comes first: `getrusage` hands a child the peak of the parent that forked it, so a
    small process started by a large one would look large. `getrusage` counts KiB on Linux and bytes on macOS.
    """
    if STATUS.exists():
        match = re.search(r"^VmHWM:\s*(\d+) kB$", STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def give_back() -> None:
    """Hand freed memory to the system, which glibc keeps for what may come; nothing where there is no glibc.

    What stays with a process counts as its own: after large temporaries that can be more than it uses.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes() -> int:
    """What this process may still allocate before the system swaps or a limit of its control group kills it."""
    return min(int(psutil.virtual_memory().available), *_left_in_groups(), sys.maxsize)


def _left_in_groups() -> Iterator[int]:
    """Bytes left in the process's control group and in those around it, where Linux limits them (version 2)."""
    match = re.search(r"^0::/(.*)$", _text(CGROUP), re.MULTILINE)
    if match is None:
        return
    group = CGROUPS / match[1]
    for folder in (group, *group.parents):
        limit, used = _text(folder / "memory.max").strip(), _text(folder / "memory.current").strip()
        if limit.isdecimal() and used.isdecimal():
            # Pages of files count as used, and are given back when they are wanted.
            files = re.search(r"^inactive_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
            yield max(0, int(limit) - int(used) + (int(files[1]) if files else 0))
        if folder == CGROUPS:
            return


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
