"""Standard output and standard error, when their reader goes away as `llmopt … | head` does."""

import os
import sys
from typing import TextIO


def write_out(text: str) -> None:
    """Write to standard output at once. A reader that has seen enough is no failure: what is left goes nowhere."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        let_go(sys.stdout)


def let_go(stream: TextIO) -> None:
    """Point a stream without a reader at nothing, so that neither later writes nor the flush at exit fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
