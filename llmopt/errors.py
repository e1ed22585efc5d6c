"""What can go wrong, as a tree.

    LlmoptError            3  could not do it
    ├── UsageError         2  the command line contradicts itself or cannot be read
    │   └── RecipeError    2  so does a recipe
    ├── ModelError         3  the model is missing, broken or cannot be trusted
    │   └── UnsupportedError  3  the model is fine, but this is not something llmopt can do with it
    ├── DataError          3  a dataset is missing, closed, or holds no text that can be read
    ├── ArtifactError      3  an artifact is missing, broken, or would be overwritten
    ├── FallbackError      3  a layer cannot have the scheme that was asked for
    ├── BudgetError        3  nothing within the budget could be made
    ├── VerificationError  3  an export does not compute what the quantized model computes
    ├── DivergedError      3  training has come to a loss or a gradient that is no number
    ├── ResourceError      3  disk or memory does not suffice
    └── Interrupted      130  somebody stopped it, and there is something to say about that

Each error says what happened, where, and what to do about it. Gates are results, not errors: see `llmopt.report.gates`.
"""

import difflib
import os
from collections.abc import Iterable
from enum import IntEnum
from typing import ClassVar

# Set by --debug. In the environment, because worker processes should do the same.
DEBUG_VARIABLE = "LLMOPT_DEBUG"


def debugging() -> bool:
    """Whether people want to see tracebacks."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in {"", "0"}


class ExitCode(IntEnum):
    """What a process tells the shell or the CI job that started it."""

    DONE = 0
    GATE_FAILED = 1
    USAGE = 2
    FAILED = 3
    INCONCLUSIVE = 4
    INTERRUPTED = 130


class LlmoptError(Exception):
    """Something a person can act on. `where` names a file, tensor, line or flag; `hint` is the next thing to try."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        """All three parts, one a line."""
        parts = [self.what, f"  in: {self.where}" if self.where else "", f"  try: {self.hint}" if self.hint else ""]
        return "\n".join(part for part in parts if part)


class UsageError(LlmoptError):
    """The command line contradicts itself, or names something that does not exist."""

    exit_code = ExitCode.USAGE


class RecipeError(UsageError):
    """A recipe cannot be read or does not say something possible."""


class ModelError(LlmoptError):
    """The model is missing, broken, or not safe to open."""


class UnsupportedError(ModelError):
    """The model may be fine, but llmopt has no way to do this with it."""


class DataError(LlmoptError):
    """A dataset cannot be fetched, or holds no text that can be read."""


class ArtifactError(LlmoptError):
    """An artifact is missing, damaged, or stands where another one should be written."""


class FallbackError(LlmoptError):
    """A layer cannot have the scheme that was asked for, and `--allow-fallback` was not given."""


class BudgetError(LlmoptError):
    """No choice of schemes keeps a model within its budget."""


class VerificationError(LlmoptError):
    """The exported graph does not compute what the quantized model computes."""


class DivergedError(LlmoptError):
    """Training has come to a loss or a gradient that is no number."""


class ResourceError(LlmoptError):
    """The disk or the memory does not suffice."""


class Interrupted(LlmoptError):  # noqa: N818 (not an error: it was asked for)
    """Somebody stopped the program, and it can go on later."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERRUPTED


def near_match(word: str, known: Iterable[str], otherwise: str | None = None, *, likeness: float = 0.6) -> str:
    """What to try instead of a word that is not known: the nearest one that is, and which there are.

    With `otherwise`, for lists too long to show, the nearest one or that. `likeness` is how near it must be, up to 1:
    names that others gave to other things are alike by chance more often than words that people mistype.
    """
    words = list(known)
    nearest = [f"did you mean {near!r}?" for near in difflib.get_close_matches(word, words, n=1, cutoff=likeness)]
    if otherwise is not None:
        return next(iter(nearest), otherwise)
    return " ".join([*nearest, f"known here: {', '.join(words)}"])
