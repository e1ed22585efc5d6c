"""Several processes that torchrun has started with one command line: what they may do, and that one of them speaks."""

import sys
import time
from contextlib import suppress

from llmopt.cli.streams import let_go
from llmopt.errors import UsageError, debugging
from llmopt.pipeline.ranks import place

SPREAD = ("quantize", "launch")
_LINGER_SECONDS = 10.0


def before_command(command: str | None) -> None:
    """Silence all processes but the first, and see that a command is not done as often as there are processes.

    Raises:
        UsageError: it would be.
    """
    rank, _ = place()
    if rank > 0:
        let_go(sys.stdout)
        if not debugging():
            let_go(sys.stderr)
    if command not in SPREAD:
        require_one_process(f"the command {command}" if command else "help")


def require_one_process(what: str) -> None:
    """Refuse what cannot be divided.

    Raises:
        UsageError: there are several processes.
    """
    _, size = place()
    if size > 1:
        raise UsageError(
            f"{what} is the work of one process, and there are {size}",
            hint=f"start it without torchrun, which is for llmopt {' and '.join(SPREAD)}",
        )


def let_the_first_speak(code: int) -> None:
    """Have a process that failed wait for the first, which says why: torchrun ends all as soon as one has ended so."""
    rank, _ = place()
    if rank > 0 and code:
        with suppress(KeyboardInterrupt):  # the first has spoken, and torchrun is clearing up
            time.sleep(_LINGER_SECONDS)
