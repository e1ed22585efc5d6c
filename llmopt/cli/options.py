"""Flags that several commands share, so that they mean the same everywhere.

An optional flag that nobody typed is None: the recipe may then say, after it the environment, and last the default.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmopt.artifact import Resume

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a .gguf file, or demo.")]


def folder(text: str) -> Path:
    """A folder to write.

    Raises:
        UsageError: it has no name; a path would take that for the working folder.
    """
    from llmopt.errors import UsageError

    if not text:
        raise UsageError("the name of the folder is empty", where="--output", hint="name one: -o OUT")
    return Path(text)


Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", parser=folder, help="The folder to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no remarks.")]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, metavar="N", help="Every random draw comes from it (default 0).")
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, metavar="N", help="Threads to compute with, in each process (default: all cores)."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the artifact that stands at the output.")]
ResumeFlag = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Insist on going on where the same command was stopped; without it that is done where it can be.",
    ),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Begin anew, whatever a command that was stopped has left to go on from.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, and do nothing.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's value: --set steps.0.quantize.scheme=w8a8."),
]
Revision = Annotated[str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit on the Hub.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's own code run where its tokenizer needs it.")
]


def resume_choice(resume: bool, restart: bool) -> "Resume":
    """What the two flags ask for.

    Raises:
        UsageError: they contradict each other.
    """
    from llmopt.artifact import Resume
    from llmopt.errors import UsageError

    if resume and restart:
        raise UsageError("--resume goes on and --restart begins anew: they exclude each other", hint="give one of them")
    if restart:
        return Resume.NEVER
    return Resume.REQUIRED if resume else Resume.IF_SAME


def thread_count(flag: int | None, recipe: int | None = None) -> int:
    """Threads to compute with: the flag, then the recipe, then LLMOPT_THREADS, then all cores that may be used, which
    the processes that torchrun starts on one machine share.

    Raises:
        UsageError: the environment names no number of threads.
    """
    from llmopt.errors import UsageError
    from llmopt.measure.host import usable_cores
    from llmopt.pipeline.ranks import processes_here

    named = os.environ.get("LLMOPT_THREADS", "")
    if flag or recipe or not named:
        return flag or recipe or max(1, usable_cores() // processes_here())
    if not named.isdecimal() or int(named) < 1:
        raise UsageError(
            f"{named!r} is no number of threads", where="LLMOPT_THREADS", hint="unset it, or give 1 or more"
        )
    return int(named)
