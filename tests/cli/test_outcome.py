import errno
import sys
from typing import Annotated

import pytest
import typer

from llmopt import errors
from llmopt.cli.outcome import run
from llmopt.errors import ExitCode


@pytest.fixture
def run_raising():
    """Run a command line whose only command raises what it is given, or returns it."""

    def run_raising(outcome, arguments=("command",)):
        app = typer.Typer(rich_markup_mode=None)

        @app.callback()
        def before():
            pass

        @app.command()
        def command(number: Annotated[int, typer.Option(min=1)] = 1):
            if isinstance(outcome, type | BaseException):
                raise outcome
            return outcome

        return run(app, list(arguments))

    return run_raising


@pytest.mark.parametrize("code", [None, *ExitCode])
def test_a_command_ends_with_the_code_that_it_returns(run_raising, code):
    assert run_raising(code) == int(code or 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError, 2),
        (errors.RecipeError, 2),
        (errors.LlmoptError, 3),
        (errors.ModelError, 3),
        (errors.UnsupportedError, 3),
        (errors.DataError, 3),
        (errors.ArtifactError, 3),
        (errors.FallbackError, 3),
        (errors.BudgetError, 3),
        (errors.VerificationError, 3),
        (errors.DivergedError, 3),
        (errors.ResourceError, 3),
        (errors.Interrupted, 130),
    ],
)
def test_our_errors_have_three_parts_and_their_exit_code(run_raising, capsys, error, code):
    assert run_raising(error("it [broke]", where="a/b.py:3", hint="mend it")) == code
    out, err = capsys.readouterr()
    assert out == ""
    word = "interrupted" if error is errors.Interrupted else "error"
    assert err == f"{word}: it [broke]\n  in: a/b.py:3\n  try: mend it\n"


def test_every_error_class_is_tested_above():
    mark = test_our_errors_have_three_parts_and_their_exit_code.pytestmark[0]
    tested = {error for error, _ in mark.args[1]}
    assert tested == {
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)
    }


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "error: the disk is full\n  in: /x/y\n  try: free"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "error: the disk is full\n  try: free"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "error: Permission denied\n  in: /x\n"),
        (MemoryError(), "error: out of memory\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "error: out of memory\n"),
        (KeyError("x"), "error: internal error: KeyError: 'x'\n  try: llmopt --debug"),
        (RuntimeError("shapes"), "error: internal error: RuntimeError: shapes\n"),
        (EOFError(), "error: internal error: "),
    ],
)
def test_other_exceptions_are_explained_without_a_traceback(run_raising, capsys, error, message):
    assert run_raising(error) == ExitCode.FAILED
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_traceback_is_there_for_those_who_ask(run_raising, capsys, monkeypatch):
    monkeypatch.setenv("LLMOPT_DEBUG", "1")
    assert run_raising(KeyError("x")) == ExitCode.FAILED
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "error: internal error: KeyError: 'x'" in err


def test_an_interrupt_ends_with_130_and_says_what_it_left(run_raising, capsys):
    assert run_raising(KeyboardInterrupt) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == "interrupted: no folder was left half written\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: Missing command.\n  try: llmopt --help\n"),
        (["comand"], "error: No such command 'comand'. Did you mean 'command'?\n  try: llmopt --help\n"),
        (["command", "--nubmer", "1"], "No such option: --nubmer (Possible options: --number)\n  try: llmopt command"),
        (["command", "--number", "x"], "error: Invalid value for '--number'"),
        (["command", "--number", "0"], "error: Invalid value for '--number'"),
        (["command", "extra"], "error: Got unexpected extra argument"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_the_near_match(run_raising, capsys, arguments, message):
    assert run_raising(None, arguments) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_errors_are_red_on_a_terminal_and_plain_elsewhere(run_raising, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm")
    run_raising(errors.ModelError("it broke"))
    assert capsys.readouterr().err == "error: it broke\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run_raising(errors.ModelError("it broke"))
    assert capsys.readouterr().err == "\x1b[1;31merror:\x1b[0m it broke\n"
    monkeypatch.setenv("NO_COLOR", "1")
    run_raising(errors.ModelError("it broke"))
    assert "\x1b[1;31m" not in capsys.readouterr().err
