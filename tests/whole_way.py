"""The command line in this process, for the tests that go the whole way."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from llmopt.cli.app import app
from llmopt.cli.outcome import run


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


class CommandLine:
    """`llmopt(...)` runs a command line; exported baselines go to a cache of the test session."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *words: object) -> Ended:
        self.capfd.readouterr()
        code = run(app, [str(word) for word in words])
        out, err = self.capfd.readouterr()
        return Ended(code, out, err)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
