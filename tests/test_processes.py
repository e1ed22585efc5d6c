"""Processes that were really started, as torchrun starts them: one result, one voice, one end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from llmopt.artifact import journal_folder
from llmopt.cli.app import app
from llmopt.cli.outcome import run
from tests.whole_way import bytes_of

OPTIONS = ("--scheme", "w4a16-sym", "--method", "gptq", "--calib-tokens", "4096", "--threads", "1")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmopt")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(scope="module")
def undisturbed(tiny_llama, tmp_path_factory):
    """What two processes under torchrun make: their folder, and what was said."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    command = [*TORCHRUN, *words(tiny_llama, folder)]
    return folder, subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def words(model, out):
    return ["quantize", str(model), "-o", str(out), *OPTIONS]


def start(*commands):
    """Start processes as torchrun does, each with a command line of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = str(len(commands))
    place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "llmopt", *map(str, command)],
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


def ended(processes):
    """(exit code, standard output, standard error) of each; where the first fails, the others are told to end."""
    first, *others = processes
    said = [first.communicate(timeout=60)]
    for process in others:
        if first.returncode:
            process.terminate()
        said.append(process.communicate(timeout=60))
    return [(process.returncode, *streams) for process, streams in zip(processes, said, strict=True)]


def wait_for_parts(out, count):
    """Until so many parts are in the journal."""
    deadline = time.monotonic() + 60
    while len(list(journal_folder(out).glob("*.seal.json"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def layers(folder):
    report = json.loads((folder / "report.json").read_text())
    return report["candidates"][0]["layers"]


def test_torchrun_gives_what_one_process_gives_and_one_process_speaks(undisturbed, tiny_llama, out):
    folder, two = undisturbed
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("wrote ") == 1
    assert two.stderr.count("writing ") <= 1
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert run(app, words(tiny_llama, out)) == 0
    for found, expected in zip(layers(folder), layers(out), strict=True):
        assert found.pop("relative_error") == pytest.approx(expected.pop("relative_error"), rel=0.02)
        assert found == expected
    assert json.loads((folder / "llmopt.json").read_text())["calibration"] is not None


def test_a_process_that_is_killed_ends_the_others_and_the_same_command_goes_on(undisturbed, tiny_llama, out):
    processes = start(words(tiny_llama, out), words(tiny_llama, out))
    wait_for_parts(out, 1)
    os.kill(processes[1].pid, signal.SIGKILL)
    (code, stdout, err), _ = ended(processes)
    assert code == 3
    assert stdout == ""
    assert "another process of this run has ended" in err
    assert {path.name for path in out.parent.iterdir()} == {journal_folder(out).name}
    again = ended(start([*words(tiny_llama, out), "--resume"], words(tiny_llama, out)))
    assert [code for code, _, _ in again] == [0, 0]
    assert "resuming at" in again[0][2]
    assert again[1][1:] == ("", "")
    first, _ = undisturbed
    expected, found = bytes_of(first), bytes_of(out)
    assert expected.keys() == found.keys()
    assert {name for name in found if found[name] != expected[name]} <= {"report.json"}


def test_an_error_in_one_process_ends_all_with_its_message_and_exit_code(tiny_llama, out, tmp_path):
    missing = [*words(tiny_llama, out), "--calib", tmp_path / "nothere.txt"]
    (code, stdout, err), (other, *silence) = ended(start(words(tiny_llama, out), missing))
    assert (code, other) == (2, 2)
    assert stdout == ""
    assert "nothere.txt (process 1 of 2, on " in err
    assert "the text cannot be read" in err
    assert "Traceback" not in err
    assert silence == ["", ""]
    assert not list(out.parent.iterdir())


def test_an_interruption_leaves_nothing_half_written(tiny_llama, out):
    processes = start(words(tiny_llama, out), words(tiny_llama, out))
    wait_for_parts(out, 2)
    for process in processes:
        process.send_signal(signal.SIGINT)
    results = ended(processes)
    assert [code for code, _, _ in results] == [130, 130]
    assert "the same command goes on where it stopped" in results[0][2]
    assert {path.name for path in out.parent.iterdir()} == {journal_folder(out).name}


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("inspect", "demo"), "the command inspect is the work of one process, and there are 2"),
        (("quantize", "demo", "-o", "out", "--method", "gptq", "--dry-run"), "--dry-run is the work of one process"),
        (("quantize", "demo", "-o", "out"), "method rtn reads no text"),
    ],
)
def test_what_cannot_be_divided_is_refused_and_not_done_twice(command, told, monkeypatch, capsys):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("llmopt.pipeline.ranks.joined", lambda explain: contextlib.nullcontext(Two()))
    assert run(app, list(command)) == 2
    assert told in capsys.readouterr().err


class Two:
    rank, size, is_first = 0, 2, True


TRAINED = ("--scheme", "w4a16", "--method", "rtn+qat", "--steps", "12", "--calib-tokens", "4096", "--threads", "1")


def test_training_that_is_divided_among_processes_has_the_losses_of_one(tiny_llama, tmp_path):
    arguments = ["quantize", str(tiny_llama), *TRAINED, "--rate", "0.05"]  # so much that six steps are a gain
    assert run(app, [*arguments, "-o", str(tmp_path / "alone")]) == 0
    command = [*TORCHRUN, *arguments, "-o", str(tmp_path / "shares"), "--shard"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("what training takes is divided among 2 processes: each needs about") == 1
    alone, shares = (
        json.loads((tmp_path / name / "report.json").read_text())["settings"]["training"]
        for name in ("alone", "shares")
    )
    losses = [[one["loss"] for one in found["held_out"][0]] for found in (alone, shares)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert alone["best_steps"] == shares["best_steps"] != [0]


def test_one_process_has_nobody_to_divide_with(tiny_llama, out, capfd):
    assert run(app, ["quantize", str(tiny_llama), "-o", str(out), *TRAINED, "--shard"]) == 2
    assert "nobody to divide" in capfd.readouterr().err
