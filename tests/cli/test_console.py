import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from llmopt.cli.console import Console
from llmopt.progress import Silent


def test_json_is_one_object_and_nothing_else(capsys):
    Console(json=True).result({"b": 1, "a": None}, "text")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"b": 1, "a": None}
    assert err == ""


def test_text_is_printed_without_markup(capsys):
    Console().result({}, "all of [it]")
    assert capsys.readouterr().out == "all of [it]\n"


def wide_table():
    table = Table()
    table.add_column("a" * 100)
    return table


def test_a_table_in_a_log_is_not_squeezed_to_eighty_columns(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS")
    Console().result({}, wide_table())
    assert "a" * 100 in capsys.readouterr().out


def test_a_table_is_as_narrow_as_columns_says(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    Console().result({}, wide_table())
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40


def test_remarks_go_to_standard_error(capsys):
    Console().progress.say("[look]")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "[look]\n")


def test_a_stream_that_knows_few_characters_gets_question_marks(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Console().result({}, "2 × 3 – good")
    assert raw.getvalue() == b"2 ? 3 ? good\n"


def test_a_stream_that_cannot_be_written_is_told_from_a_full_disk():
    program = "from llmopt.cli.console import Console; Console().result({}, 'text')"
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ended.returncode == 1  # and not 120, which is what a flush that fails at exit gives
    assert "LlmoptError: standard output could not be written: No space left on device" in ended.stderr


@pytest.mark.parametrize("json", [True, False])
def test_quiet_says_nothing_but_the_result(capsys, json):
    console = Console(json=json, quiet=True)
    assert isinstance(console.progress, Silent)
    console.progress.say("look")
    console.result({"a": 1}, "text")
    out, err = capsys.readouterr()
    assert out
    assert err == ""
