"""Standard output and standard error: their reader may go away, as in `llmopt … | head`, or know few characters."""

import os
import sys
from typing import TextIO

from llmopt.errors import LlmoptError


def write_out(text: str) -> None:
    """Write to standard output at once. A reader that has seen enough is no failure: what is left goes nowhere.

    Raises:
        LlmoptError: it cannot be written to.
    """
    try:
        sys.stdout.write(_writable(text))
        sys.stdout.flush()
    except BrokenPipeError:
        let_go(sys.stdout)
    except OSError as error:
        let_go(sys.stdout)
        what = f"standard output could not be written: {error.strerror}"
        raise LlmoptError(
            what, hint="all else that the command does is done; write the output to another place"
        ) from error


def _writable(text: str) -> str:
    """Text with a question mark for each character that standard output has no way to say."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)


def let_go(stream: TextIO) -> None:
    """Point a stream without a reader at nothing, so that neither later writes nor the flush at exit fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
