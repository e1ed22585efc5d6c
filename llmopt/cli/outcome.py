"""How a command ends: every exception becomes a message of three parts and an exit code."""

import errno
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from llmopt.errors import ExitCode, Interrupted, LlmoptError, ResourceError, UsageError, debugging

NOTHING_HALF = "no folder was left half written"
# PyTorch reports this as a RuntimeError like any other.
_TORCH_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run a command line (this process's own if None) and give the exit code.

    A command ends with None for done, or returns an `ExitCode`.
    """
    try:
        code = app(args=arguments, prog_name="llmopt", standalone_mode=False)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    except SystemExit as leaving:
        code = _code_of_exit(leaving)
    except Exception as error:
        return _fail(error)
    # typer turns Ctrl-C into this code before we see it.
    if code == ExitCode.INTERRUPTED:
        _print("interrupted", NOTHING_HALF)
    return int(code or ExitCode.DONE)


@contextmanager
def resumable(outputs: Iterable[Path]) -> Iterator[None]:
    """Have an interruption say so if one of these outputs has a journal to go on from.

    Raises:
        Interrupted: it was interrupted, and has.
    """
    from llmopt.artifact import journal_folder

    try:
        yield
    except KeyboardInterrupt as stop:
        if any(journal_folder(output).is_dir() for output in outputs):
            raise Interrupted(f"{NOTHING_HALF}; the same command goes on where it stopped") from stop
        raise


def _code_of_exit(leaving: SystemExit) -> int:
    if isinstance(leaving.__context__, BrokenPipeError):
        # typer was printing help, and its reader has seen enough.
        return ExitCode.DONE
    return leaving.code if isinstance(leaving.code, int) else ExitCode.FAILED


def _fail(error: Exception) -> int:
    if debugging():
        traceback.print_exception(error)
    explained = explain(error)
    _print("interrupted" if isinstance(explained, Interrupted) else "error", str(explained))
    return explained.exit_code


def explain(error: Exception) -> LlmoptError:
    """Any exception as one that says what happened, where, and what to do about it."""
    match error:
        case LlmoptError():
            return error
        case typer.TyperException():
            return _usage(error)
        case OSError(strerror=str()):
            return _from_system(error)
        case MemoryError():
            return _out_of_memory()
        case RuntimeError() if any(words in str(error) for words in _TORCH_OUT_OF_MEMORY):
            return _out_of_memory()
    what = f"internal error: {type(error).__name__}: {error}"
    return LlmoptError(what, hint="llmopt --debug COMMAND shows the traceback; please report it")


def _usage(error: typer.TyperException) -> LlmoptError:
    context = getattr(error, "ctx", None)
    program = context.command_path if context else "llmopt"
    return UsageError(error.format_message(), hint=f"{program} --help")


def _from_system(error: OSError) -> LlmoptError:
    where = str(error.filename) if error.filename is not None else None
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return ResourceError("the disk is full", where=where, hint="free some space, or write to another disk")
    return LlmoptError(str(error.strerror), where=where)


def _out_of_memory() -> LlmoptError:
    return ResourceError("out of memory", hint="close other programs, or use a smaller model")


def _print(label: str, message: str) -> None:
    from rich.text import Text

    from llmopt.cli.progress import stderr_console

    stderr_console().print(Text.assemble((f"{label}:", "bold red"), " ", message), soft_wrap=True)
