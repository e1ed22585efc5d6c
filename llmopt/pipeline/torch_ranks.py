"""Processes that exchange over torch.distributed, and tell each other why they end."""

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from llmopt.errors import ExitCode, Interrupted, LlmoptError, UsageError
from llmopt.pipeline.ranks import Explain, Ranks, Value

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# The first process plans and verifies by itself, and the others wait for it that long at most. One that ends is noticed
# at once, by its connections; only one whose machine has vanished is waited for.
PATIENCE = timedelta(hours=2)
MEETING = timedelta(minutes=5)  # between the first that has started and the last
_FAILURE = "llmopt/failure"
_FAILURE_SECONDS = 2.0  # by then a process that failed has said why, if it could
_ERRORS: Mapping[int, type[LlmoptError]] = {ExitCode.USAGE: UsageError, ExitCode.INTERRUPTED: Interrupted}


@contextmanager
def connected(explain: Explain) -> Iterator[Ranks]:
    """See `llmopt.pipeline.ranks.joined`."""
    ranks = _connect()
    try:
        yield ranks
    except BaseException as error:
        cause = ranks.failed(error, explain)
        if cause is error:
            raise
        raise cause from error
    finally:
        dist.destroy_process_group()


def _connect() -> "TorchRanks":
    try:
        store, rank, size = next(rendezvous("env://", timeout=MEETING))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except RuntimeError as error:
        raise LlmoptError(
            f"the processes of this run do not find each other: {error}",
            hint="GLOO_SOCKET_IFNAME names the network interface to use",
        ) from error
    return TorchRanks(rank, size, store)


class TorchRanks(Ranks):
    """One process of several, over torch.distributed."""

    def __init__(self, rank: int, size: int, store: "Store") -> None:
        super().__init__(rank, size)
        self._store = store

    def gather(self, value: Value) -> list[Value]:
        """The values of all, in the order of their ranks."""
        values: list[Value | None] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def of_first(self, compute: Callable[[], Value]) -> Value:
        """What the first process computes, on all."""
        values = [compute() if self.is_first else None]
        with self._exchange():
            dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[return-value]

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of those of all."""
        with self._exchange():
            dist.all_reduce(tensor)

    def failed(self, error: BaseException, explain: Explain) -> BaseException:
        """Tell the others why this one ends, if none has failed before; gives what it should end with."""
        self._ignore_termination()
        interrupted = isinstance(error, KeyboardInterrupt | Interrupted)
        if interrupted and (cause := self._failure()) is not None and not isinstance(cause, Interrupted):
            return cause  # torchrun interrupts all others when one has failed
        told = explain(error) if isinstance(error, Exception) else Interrupted("a process was interrupted")
        where = f"process {self.rank} of {self.size}, on {socket.gethostname()}"
        where = where if told.where is None else f"{told.where} ({where})"
        words = {"code": told.exit_code, "what": told.what, "where": where, "hint": told.hint}
        with suppress(RuntimeError):  # the store may have ended with another process
            self._store.compare_set(_FAILURE, "", json.dumps(words))
        return error

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # all that torch.distributed knows: a connection was closed, or nobody answered
            self._ignore_termination()
            raise self._cause() from error

    def _cause(self) -> LlmoptError:
        deadline = time.monotonic() + _FAILURE_SECONDS
        while time.monotonic() < deadline:
            if (failure := self._failure()) is not None:
                return failure
            time.sleep(0.05)
        return LlmoptError(
            "another process of this run has ended, or cannot be reached, and left no word",
            hint="torchrun says how it ended; out of memory is the most frequent cause",
        )

    def _ignore_termination(self) -> None:
        """From here on the first process clears up and says what happened, which torchrun's SIGTERM would cut short."""
        if self.is_first and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _failure(self) -> LlmoptError | None:
        """What the first process that failed said."""
        with suppress(RuntimeError):
            if self._store.check([_FAILURE]):
                words = json.loads(self._store.get(_FAILURE))
                return _ERRORS.get(words.pop("code"), LlmoptError)(words.pop("what"), **words)
        return None
