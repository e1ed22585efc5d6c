"""The most memory that this process ever held."""

import re
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


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
