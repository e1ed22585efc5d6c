"""Several processes on one job: each takes some of the windows and some of the rows, and what they find goes round.

`torchrun` starts them and tells each, in its environment, how to find the others. A process is called by its rank, the
first by 0: that one alone reads and writes files of the output, and speaks. Alone, a process exchanges nothing.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

from llmopt.errors import ExitCode, Interrupted, LlmoptError, UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

Item = TypeVar("Item")
Value = TypeVar("Value")
Explain = Callable[[Exception], LlmoptError]

_PLACES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The first process plans and verifies by itself, and the others wait for it that long at most. One that ends is noticed
# at once, by its connections; only one whose machine has vanished is waited for.
PATIENCE = timedelta(hours=2)
_FAILURE = "llmopt/failure"
_FAILURE_SECONDS = 2.0  # by then a process that failed has said why, if it could
_ERRORS: Mapping[int, type[LlmoptError]] = {ExitCode.USAGE: UsageError, ExitCode.INTERRUPTED: Interrupted}


class Ranks:
    """One process of `size`, here the only one. What is called on one is called on all, in the same order."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def is_first(self) -> bool:
        """Whether this process reads, writes and speaks."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all, in the order of their ranks."""
        return [value]

    def of_first(self, compute: Callable[[], Value]) -> Value:
        """What the first process computes, on all."""
        return compute()

    def add_up(self, tensor: "Tensor") -> None:
        """Replace a tensor by the sum of those of all."""

    def shares(self, count: int) -> list[slice]:
        """So many things divided in their order, as evenly as can be: which of them each process takes."""
        ends = [count * rank // self.size for rank in range(self.size + 1)]
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def spread(self, compute: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
        """What `compute` makes of each item, on all; one process computes it."""
        found = self.gather([compute(item) for item in items[self.rank :: self.size]])
        return [found[index % self.size][index // self.size] for index in range(len(items))]


ALONE = Ranks()


class _Joined(Ranks):
    """One process of several, over torch.distributed."""

    def __init__(self, rank: int, size: int, store: "Store") -> None:
        super().__init__(rank, size)
        self._store = store

    def gather(self, value: Value) -> list[Value]:
        import torch.distributed as dist  # noqa: PLC0415 (late: the command line asks for `place` before torch is needed)

        values: list[Value | None] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def of_first(self, compute: Callable[[], Value]) -> Value:
        import torch.distributed as dist  # noqa: PLC0415

        values = [compute() if self.is_first else None]
        with self._exchange():
            dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[return-value]

    def add_up(self, tensor: "Tensor") -> None:
        import torch.distributed as dist  # noqa: PLC0415

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


def place() -> tuple[int, int]:
    """The rank of this process and the number of them all, as a launcher such as torchrun has said; else 0 and 1."""
    if any(name not in os.environ for name in _PLACES):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def processes_here() -> int:
    """How many of the processes share this machine."""
    return 1 if place() == (0, 1) else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined(explain: Explain) -> Iterator[Ranks]:
    """The processes that a launcher has started, this one among them; all of them end if one does.

    An error of one process is raised in the others as well, when they next exchange something. From then on the first
    ignores SIGTERM, which torchrun sends to all when a process has failed.

    Args:
        explain: makes an error that people can act on of any other, for the others to show.

    Raises:
        LlmoptError: the processes do not find each other, or another one failed.
    """
    rank, size = place()
    if size == 1:
        yield ALONE
        return
    import torch.distributed as dist  # noqa: PLC0415

    ranks = _Joined(rank, size, _connected())
    try:
        yield ranks
    except BaseException as error:
        cause = ranks.failed(error, explain)
        if cause is error:
            raise
        raise cause from error
    finally:
        dist.destroy_process_group()


def _connected() -> "Store":
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

    try:
        store: Store
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except RuntimeError as error:
        address = ":".join(os.environ[name] for name in _PLACES[2:])
        raise LlmoptError(
            f"the processes of this run do not find each other: {error}",
            where=address,
            hint="GLOO_SOCKET_IFNAME names the network interface to use",
        ) from error
    return store
