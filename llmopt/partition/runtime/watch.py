"""Ranks that watch each other, so that one that dies or hangs ends all, by its name, within a time that was promised.

A thread of each rank tells the others through the store of torch.distributed how far it is. One whose thread is silent
has stopped; one that goes on computing without getting anywhere hangs. One that waits is never at fault. The store is
kept by the first rank, and whoever asks it waits for as long as it takes: a second thread sees to that.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from llmopt.errors import LlmoptError
from llmopt.partition.runtime.layout import Layout
from llmopt.partition.runtime.trace import Trace

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_BEATS_PER_TIMEOUT = 20
_LONGEST_PAUSE_S = 1.0


class Watch(threading.Thread):
    """Watches until `stop` is called. `fail` gets the error once, in this thread, and does not return."""

    def __init__(
        self,
        store: "Store",
        layout: Layout,
        rank: int,
        trace: Trace,
        *,
        timeout_s: float,
        fail: Callable[[LlmoptError], None],
    ) -> None:
        super().__init__(daemon=True, name="llmopt-watch")
        self._store = store.clone()  # type: ignore[attr-defined]  # a connection of its own: it never waits for the first
        self._layout, self._rank, self._trace = layout, rank, trace
        self._timeout_s, self._fail = timeout_s, fail
        self._done = threading.Event()
        self._seen = {other: ("", time.monotonic()) for other in range(layout.size) if other != rank}
        self._progress = dict(self._seen)
        self._pause_s = min(_LONGEST_PAUSE_S, timeout_s / _BEATS_PER_TIMEOUT)
        self._answered_s = time.monotonic()

    def run(self) -> None:
        """Tell, and look, at every beat."""
        threading.Thread(target=self._watch_store, daemon=True, name="llmopt-watch-store").start()
        beats = 0
        while not self._done.wait(self._pause_s):
            self._answered_s = time.monotonic()
            beats += 1
            try:
                self._tell(beats)
                found = self._look()
            except RuntimeError:  # the store went with its process
                found = None if self._done.is_set() else self._error(0, "has ended, or cannot be reached")
            if found is not None and not self._done.is_set():
                self._fail(found)

    def _watch_store(self) -> None:
        while not self._done.wait(self._pause_s):
            if time.monotonic() - self._answered_s > self._timeout_s:
                self._fail(self._error(0, f"has not answered for {self._timeout_s:g} s"))

    def stop(self) -> None:
        """No longer: the others may end now."""
        self._done.set()

    def _tell(self, beats: int) -> None:
        beat = {
            "beats": beats,
            "steps": self._trace.steps,
            "waiting": self._trace.waiting,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._store.set(_key(self._rank), json.dumps(beat))

    def _look(self) -> LlmoptError | None:
        now = time.monotonic()
        for other in self._seen:
            if not self._store.check([_key(other)]):
                text, steps = "", ""
            else:
                text = self._store.get(_key(other)).decode()
                beat = json.loads(text)
                steps = f"{beat['steps']} {now if beat['waiting'] else ''}"
            for table, value in ((self._seen, text), (self._progress, steps)):
                if table[other][0] != value:
                    table[other] = (value, now)
            if now - self._seen[other][1] > self._timeout_s:
                return self._silent(other, text)
            if now - self._progress[other][1] > self._timeout_s:
                return self._error(other, f"has got nowhere for {self._timeout_s:g} s")
        return None

    def _silent(self, other: int, text: str) -> LlmoptError:
        if not text:
            return self._error(other, f"has not begun within {self._timeout_s:g} s")
        beat = json.loads(text)
        if beat["host"] == socket.gethostname():
            with suppress(OSError):  # what is stopped for good keeps its memory, and torchrun waiting
                os.kill(beat["pid"], signal.SIGKILL)
        return self._error(other, f"has not answered for {self._timeout_s:g} s")

    def _error(self, other: int, what: str) -> LlmoptError:
        return LlmoptError(
            f"{self._layout.name(other)} {what}", hint="if it is only slow, give it more time with --timeout"
        )


def _key(rank: int) -> str:
    return f"llmopt/beat/{rank}"
