"""Progress, as the rooms below the command line see it: they report steps, the command line decides how that looks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """A piece of work under way."""

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        """Some steps are done; `note` says in a few words what is next."""
        ...


class Progress(Protocol):
    """Where work is announced."""

    def task(self, description: str, total: float | None = None) -> AbstractContextManager[Task]:
        """Announce work of `total` steps (None: unknown)."""
        ...

    def say(self, message: str) -> None:
        """A line for the person who watches (stderr, never stdout)."""
        ...


class Silent:
    """Announces nothing: for tests and for callers from Python."""

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Nothing is shown."""
        yield self

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        """Nothing is shown."""

    def say(self, message: str) -> None:
        """Nothing is shown."""
