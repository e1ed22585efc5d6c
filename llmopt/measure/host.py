"""The machine and the programs that a measurement depends on."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

CPUINFO = Path("/proc/cpuinfo")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
# The instructions that decide which kernels onnxruntime and torch choose, as Linux names them on x86 and on Arm.
KERNEL_ISA = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
PACKAGES = (
    "compressed-tensors",
    "llmopt",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "tokenizers",
    "torch",
    "transformers",
)


def describe_host(threads: int) -> dict[str, Any]:
    """What does not change from one run to the next; unknown things are None."""
    cpuinfo = _read(CPUINFO) or ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    known = set(flags[1].split()) if flags else None
    return {
        "cpu": model[1] if model else platform.processor() or None,
        "machine": platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": threads,
        "isa": None if known is None else [name for name in KERNEL_ISA if name in known],
        "memory_bytes": psutil.virtual_memory().total,
        "os": platform.platform(),
        "governor": _read(GOVERNOR),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute, read without importing them; what is missing is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def usable_cores() -> int:
    """Cores that this process may run on: fewer than the machine has where it is pinned."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Processes that ran or waited for a core, averaged over the last minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
