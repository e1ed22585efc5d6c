"""Progress on standard error: bars on a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.console
import rich.progress

from llmopt.cli.streams import let_go
from llmopt.progress import Task

# A line when this much time has passed, and as much of the work or that much more time.
_LINE_SECONDS = 10.0
_LINE_SHARE = 0.1
_LINE_SECONDS_AT_MOST = 60.0
# Work that took less is not worth a line at its end.
_BRIEF_SECONDS = 2.0


class _StderrConsole(rich.console.Console):
    def on_broken_pipe(self) -> None:
        # rich would end the program; nobody is watching any more, which is no reason to stop working.
        self.quiet = True
        let_go(sys.stderr)


def stderr_console() -> rich.console.Console:
    """Standard error, as rich draws on it; honours NO_COLOR."""
    return _StderrConsole(stderr=True)


class BarProgress:
    """A bar for each task, with the time left, gone when the task is done."""

    def __init__(self, console: rich.console.Console) -> None:
        plain = rich.progress.TextColumn
        self._bars = rich.progress.Progress(
            plain("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeRemainingColumn(),
            plain("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
            refresh_per_second=2,  # drawing must not disturb what is being timed in another process
        )
        self._open = 0

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Show a bar while the block runs."""
        if not self._open:
            self._bars.start()
        self._open += 1
        number = self._bars.add_task(description, total=total, note="")
        try:
            yield _Bar(self._bars, number)
        finally:
            self._bars.remove_task(number)
            self._open -= 1
            if not self._open:
                self._bars.stop()

    def say(self, message: str) -> None:
        """Print above the bars."""
        self._bars.console.print(message, markup=False, highlight=False)


class _Bar:
    def __init__(self, bars: rich.progress.Progress, number: rich.progress.TaskID) -> None:
        self._bars = bars
        self._number = number

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        self._bars.update(self._number, advance=steps)
        if note is not None:
            self._bars.update(self._number, note=note)


class LineProgress:
    """For logs. `clock` gives seconds."""

    def __init__(self, console: rich.console.Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Print a line now and then while the block runs, and one at its end if it was not brief."""
        task = _Lines(description, total, self.say, self._clock)
        yield task
        task.finish()

    def say(self, message: str) -> None:
        """Print a line."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


class _Lines:
    def __init__(
        self, description: str, total: float | None, say: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self._description = description
        self._total = total
        self._say = say
        self._clock = clock
        self._began = self._line_at = clock()
        self._done = self._line_done = 0.0

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        self._done += steps
        now = self._clock()
        if not self._is_due(now):
            return
        self._line_at, self._line_done = now, self._done
        self._say(f"{self._description}: {self._state(now)}" + (f" ({note})" if note else ""))

    def finish(self) -> None:
        seconds = self._clock() - self._began
        if seconds >= _BRIEF_SECONDS:
            self._say(f"{self._description}: done in {_duration(seconds)}")

    def _is_due(self, now: float) -> bool:
        waited = now - self._line_at
        moved = self._total is not None and self._done - self._line_done >= _LINE_SHARE * self._total
        return waited >= (_LINE_SECONDS if moved else _LINE_SECONDS_AT_MOST)

    def _state(self, now: float) -> str:
        elapsed = now - self._began
        if self._total is None or self._done <= 0:
            return f"{self._done:g} done in {_duration(elapsed)}"
        left = elapsed / self._done * max(self._total - self._done, 0)
        return f"{self._done / self._total:.0%}, {_duration(left)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
