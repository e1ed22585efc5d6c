"""What was timed on this machine, once: a small file in the cache folder, and the journal of a run that reads it."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from llmopt.artifact import Journal, to_json_text, write_json
from llmopt.pipeline.cache import CACHE_VARIABLE
from llmopt.progress import Progress

PIECE = "timings.json"

# Of each thing that was timed, and of each candidate for it, milliseconds.
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Times = dict[str, dict[str, Milliseconds]]
_TIMES = TypeAdapter(Times)


class Timings:
    """Times by name. A journal comes before the file, so that a run that goes on chooses as it did before."""

    def __init__(self, file: Path, journal: Journal | None, progress: Progress) -> None:
        self.file = file
        self.journal = journal
        self.progress = progress
        self.known: Times = self._from_file() | self._from_journal()
        self.used: Times = {}
        self.announced = self.warned = False

    def of(
        self, name: str, candidates: Collection[str], measure: Callable[[], dict[str, float]]
    ) -> Mapping[str, float]:
        """The times of all candidates, measured if they are not known."""
        if name in self.used:
            return self.used[name]
        found = self.known.get(name)
        if found is None or list(found) != list(candidates):
            self._announce()
            found = measure()
            self._keep(name, found)
        self.used[name] = found
        if self.journal is not None:
            self.journal.write(PIECE, to_json_text(self.used).encode())
        return found

    def _announce(self) -> None:
        if not self.announced:
            self.progress.say(f"measuring once what is fastest on this machine, kept in {self.file}")
        self.announced = True

    def _from_file(self) -> Times:
        try:
            return _TIMES.validate_json(self.file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError):
            self.progress.say(f"{self.file} cannot be read as timings: it is made anew")
            return {}

    def _from_journal(self) -> Times:
        data = None if self.journal is None else self.journal.read(PIECE)
        return {} if data is None else _TIMES.validate_json(data)

    def _keep(self, name: str, found: dict[str, float]) -> None:
        """Add to what other processes have kept meanwhile."""
        self.known[name] = found
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, (self._from_file() if self.file.exists() else {}) | {name: found})
        except OSError as error:
            if not self.warned:
                why = f"{error.strerror}: the next run measures again; {CACHE_VARIABLE} names another cache"
                self.progress.say(f"{self.file} cannot be written: {why}")
            self.warned = True
