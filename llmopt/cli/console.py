"""What a command says: its result on standard output, everything else on standard error.

rich is imported where something is drawn, because `--help` has no use for it and should not wait.
"""

import io
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llmopt.cli.streams import write_out
from llmopt.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType

    Drawing = RenderableType | Callable[[RichConsole], None]

# Tables in the log of a CI job have no terminal to ask for its width.
_WIDTH_OF_A_LOG = 120


class Console:
    """The voice of one command. `progress` is for the rooms below; with `quiet` it says nothing."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self._json = json
        self.progress: Progress = Silent() if quiet else _progress()

    def result(self, value: Mapping[str, Any], text: "Drawing") -> None:
        """Print the result: `value` as one JSON object if that was asked for, else `text`, which rich draws.

        `text` is something that rich can print, or a function that prints on the console that it is given.
        """
        if self._json:
            from llmopt.artifact import to_json_text

            write_out(to_json_text(value))
        else:
            write_out(_drawn(text))


def _progress() -> Progress:
    from llmopt.cli.progress import BarProgress, LineProgress, stderr_console

    console = stderr_console()
    return BarProgress(console) if console.is_terminal else LineProgress(console)


def _drawn(text: "Drawing") -> str:
    from rich.console import Console as RichConsole

    # Not on standard output itself: what goes wrong there should go wrong in `write_out`.
    terminal = sys.stdout.isatty()
    paper = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding, errors="replace", newline="\n")
    width = None if terminal or "COLUMNS" in os.environ else _WIDTH_OF_A_LOG
    console = RichConsole(file=paper, width=width, force_terminal=True if terminal else None)
    if callable(text):
        text(console)
    else:
        console.print(text, markup=False, highlight=False)
    paper.seek(0)
    return paper.read()
