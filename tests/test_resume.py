"""A calibrated run that was stopped, however and whenever, goes on and ends with the bytes of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from llmopt.artifact import journal_folder
from llmopt.cli.app import app
from llmopt.cli.outcome import run
from tests.whole_way import CommandLine, bytes_of

OPTIONS = ("--scheme", "w4a16-sym", "--method", "gptq", "--calib-tokens", "4096", "--threads", "1")
PARTS = 4  # embedding, two blocks, head


@pytest.fixture
def llmopt(capfd):
    return CommandLine(capfd)


@pytest.fixture(scope="module")
def undisturbed(tiny_llama, tmp_path_factory):
    """What comes of the command when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(app, words(tiny_llama, folder)) == 0
    return content(folder)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def words(model, out):
    return ["quantize", str(model), "-o", str(out), *OPTIONS]


def program(model, out):
    return [sys.executable, "-m", "llmopt", *words(model, out)]


def content(folder):
    """Every file; of the report, all but what names this run."""
    files = bytes_of(folder)
    report = json.loads(files.pop("report.json"))
    assert report["candidates"][0].pop("name") == folder.name
    return files, report


def stop(model, out, sent, *, parts, delay_s=0.0):
    """Start the command, and send it a signal a moment after it has finished so many parts; gives how it ended."""
    process = subprocess.Popen(program(model, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(journal_folder(out).glob("*.safetensors.seal.json"))) < parts:
        assert process.poll() is None, "it ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay_s)
    os.kill(process.pid, sent)
    _, err = process.communicate()
    return process.returncode, err


def test_kill_9_at_random_moments_changes_nothing(llmopt, tiny_llama, out, undisturbed):
    draw = random.Random(time.time_ns())  # other moments in every run of the tests
    for parts in (1, PARTS - 1):
        code, _ = stop(tiny_llama, out, signal.SIGKILL, parts=parts, delay_s=draw.uniform(0, 0.02))
        assert code == -signal.SIGKILL
        assert not out.exists()
    ended = llmopt(*words(tiny_llama, out), "--resume")
    assert ended.code == 0, ended.err
    assert "resuming at" in ended.err
    assert content(out) == undisturbed
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_ctrl_c_says_that_the_same_command_goes_on(llmopt, tiny_llama, out, undisturbed):
    code, err = stop(tiny_llama, out, signal.SIGINT, parts=2)
    assert code == 130
    assert "the same command goes on where it stopped" in err.splitlines()[-1]
    assert {path.name for path in out.parent.iterdir()} == {journal_folder(out).name}
    assert llmopt(*words(tiny_llama, out)).code == 0
    assert content(out) == undisturbed


@pytest.fixture
def stopped(llmopt, tiny_llama, out, monkeypatch):
    """What a full disk left behind the first block."""
    from llmopt.artifact import Journal

    write = Journal.write

    def full(self, name, data):
        if "block-1" in name:
            raise OSError(28, "No space left on device")
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", full)
        ended = llmopt(*words(tiny_llama, out))
    assert ended.code == 3
    assert "disk is full" in ended.err
    assert len(list(journal_folder(out).glob("*.safetensors.seal.json"))) == 2


def test_a_full_disk_costs_no_more_than_the_part_at_hand(stopped, llmopt, tiny_llama, out, undisturbed):
    ended = llmopt(*words(tiny_llama, out))
    assert "resuming at block 2 of 2" in ended.err
    assert content(out) == undisturbed


def test_a_damaged_journal_is_mended(stopped, llmopt, tiny_llama, out, undisturbed):
    for file in journal_folder(out).glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    ended = llmopt(*words(tiny_llama, out))
    assert "damaged" in ended.err
    assert content(out) == undisturbed


def test_to_begin_anew_ends_the_same(stopped, llmopt, tiny_llama, out, undisturbed):
    ended = llmopt(*words(tiny_llama, out), "--restart")
    assert "resuming" not in ended.err
    assert content(out) == undisturbed


@pytest.mark.parametrize("changed", [("--seed", "1"), ("--calib-tokens", "2048")])
def test_another_command_takes_nothing_of_it(stopped, llmopt, tiny_llama, out, changed):
    refused = llmopt(*words(tiny_llama, out), *changed, "--resume")
    assert refused.code == 2
    assert "not of this command" in refused.err
    ended = llmopt(*words(tiny_llama, out), *changed)
    assert ended.code == 0
    assert "other work: thrown away" in ended.err
    assert "resuming" not in ended.err
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--method", "gptq", "--resume"), "no journal to resume from"),
        (("--resume", "--restart"), "exclude each other"),
        (("--method", "rtn", "--resume"), "keeps no journal"),
    ],
)
def test_what_cannot_be_resumed_is_told(llmopt, out, flags, told):
    ended = llmopt("quantize", "demo", "-o", out, *flags)
    assert ended.code == 2
    assert told in ended.err
    assert not list(out.parent.iterdir())


def test_a_method_without_a_journal_clears_away_what_another_left(stopped, llmopt, tiny_llama, out):
    assert llmopt("quantize", tiny_llama, "-o", out, "--threads", "1").code == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]
