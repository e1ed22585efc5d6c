"""Ranks started on this machine, as torchrun starts them, and ended together.

torchrun would do as well, and does for several machines; but it waits half a minute for a rank that hangs, and tells of
one that ends by a traceback.
"""

import json
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llmopt.errors import ExitCode, LlmoptError, UsageError
from llmopt.partition.runtime.layout import Layout

FAILURES: Final = "LLMOPT_FAILURES"  # the folder in which a rank says why it ends
_POLL_S = 0.02
_LAST_WORDS_S = 2.0
_KILLED = "out of memory is the most frequent cause: llmopt partition says what each stage needs"


def run_processes(
    layout: Layout, command: Sequence[str], folder: Path, timeout_s: float, *, shares: int | None
) -> None:
    """Run one process for each rank, the command the same for all, until all have ended.

    Args:
        layout: how many, and what people call them.
        command: starts a rank that finds its place in the environment.
        folder: an empty one, where ranks that fail say why.
        timeout_s: how long the rest may take once one has ended well.
        shares: into how many parts this machine's cores are divided, of which each process has one for itself, where
            there are enough; None: they take what they get.

    Raises:
        LlmoptError: one failed. All have ended.
    """
    cores = _cores(layout.size, shares)
    environment = os.environ | _meeting(layout.size) | {FAILURES: str(folder)}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(layout.size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment | place | _threads(cores[rank])))
            if cores[rank]:
                os.sched_setaffinity(processes[-1].pid, cores[rank])
        codes = _wait(processes, timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    _require_success(layout, codes, folder)


def say_why(error: LlmoptError, *, lost: bool = False) -> None:
    """Leave word for the process that started this rank: why it ends, or that it only `lost` another one."""
    folder = os.environ.get(FAILURES)
    if folder is None:
        return
    words = {"what": error.what, "where": error.where, "hint": error.hint, "code": int(error.exit_code)}
    path = Path(folder) / f"{os.environ['RANK']}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(words | {"lost": lost}))
    partial.replace(path)


def _meeting(size: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()}


def _cores(ranks: int, shares: int | None) -> list[tuple[int, ...]]:
    """The cores of each rank; none where they are not divided."""
    if shares is None or not hasattr(os, "sched_getaffinity"):
        return [()] * ranks
    usable = sorted(os.sched_getaffinity(0))
    each = len(usable) // max(shares, ranks)
    return [tuple(usable[rank * each : (rank + 1) * each]) for rank in range(ranks)]


def _threads(cores: Sequence[int]) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(max(1, len(cores)))}


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> dict[int, int | None]:
    """The exit codes of all, by rank, None of what did not end.

    Once one has ended well, the rest have their time; once one has not, no longer than it takes to say what they know.
    """
    deadline, failing = math.inf, False
    while True:
        codes = {rank: process.poll() for rank, process in enumerate(processes)}
        ended = [code for code in codes.values() if code is not None]
        if len(ended) == len(codes) or time.monotonic() > deadline:
            return codes
        if any(ended) and not failing:
            deadline, failing = time.monotonic() + _LAST_WORDS_S, True
        elif ended and deadline == math.inf:
            deadline = time.monotonic() + timeout_s
        time.sleep(_POLL_S)


def _require_success(layout: Layout, codes: Mapping[int, int | None], folder: Path) -> None:
    if not any(codes.values()) and None not in codes.values():
        return
    words = _words(folder)
    for said in words:
        if not said["lost"]:
            kind = UsageError if said["code"] == ExitCode.USAGE else LlmoptError
            raise kind(said["what"], where=said["where"], hint=said["hint"])
    for rank, code in codes.items():
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            raise LlmoptError(f"{layout.name(rank)} was killed by {name}", hint=_KILLED)
    silent = [rank for rank, code in codes.items() if code is None]
    if silent and not words:
        raise LlmoptError(f"{layout.name(silent[0])} did not end with the others", hint="please report it")
    if words:
        raise LlmoptError(words[0]["what"], where=words[0]["where"])
    rank = next(rank for rank, code in codes.items() if code)
    raise LlmoptError(f"{layout.name(rank)} ended with exit code {codes[rank]} and left no word", hint=_KILLED)


def _words(folder: Path) -> list[dict[str, Any]]:
    """What ranks said, the first to speak first."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in paths]
