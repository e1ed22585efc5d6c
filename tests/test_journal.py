"""Finished pieces outlive their process, and are never taken for those of other work."""

import subprocess
import sys

import pytest

from llmopt import artifact
from llmopt.artifact import Resume, journal_folder
from llmopt.errors import ArtifactError, UsageError


class Heard:
    """Remembers what was said."""

    def __init__(self):
        self.lines = []

    def say(self, message):
        self.lines.append(message)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def opened(out, heard):
    def opened(key="key", resume=Resume.IF_SAME):
        return artifact.journal(out, key, resume, heard)

    return opened


@pytest.fixture
def left(opened):
    """What a run left that was stopped behind its first piece."""
    stop_behind(opened, b"first")


def stop_behind(opened, data):
    """A run that is stopped when it has written a piece; gives what it found of that."""
    found = []

    def work():
        with opened() as kept:
            found.append(kept.read("a"))
            kept.write("a", data)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    return found[0]


def pieces(kept, *names):
    return [kept.read(name) for name in names]


def test_pieces_come_back_after_a_stop_and_the_journal_goes_when_all_is_done(left, opened, out):
    with opened() as kept:
        assert pieces(kept, "a", "b") == [b"first", None]
        kept.write("b", b"")
        assert pieces(kept, "a", "b") == [b"first", b""]
    assert not list(out.parent.iterdir())


def test_what_failed_before_its_first_piece_leaves_nothing(opened, out):
    with pytest.raises(ValueError, match="early"), opened():
        raise ValueError("early")
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut", "no seal", "torn seal", "no file"])
def test_a_damaged_piece_counts_as_not_done(left, opened, out, damage):
    file, seal = journal_folder(out) / "a", journal_folder(out) / "a.seal.json"
    if damage in ("flip", "cut"):
        file.write_bytes({"flip": b"firsu", "cut": b"firs"}[damage])
    elif damage == "torn seal":
        seal.write_bytes(seal.read_bytes()[:-5])
    else:
        {"no seal": seal, "no file": file}[damage].unlink()
    assert stop_behind(opened, b"again") is None
    with opened() as kept:
        assert kept.read("a") == b"again"


def test_what_a_killed_process_was_writing_is_cleared_up(left, opened, out):
    (journal_folder(out) / "b.partial").write_bytes(b"ha")
    with opened() as kept:
        assert {path.name for path in kept.folder.iterdir()} == {"key", "a", "a.seal.json"}


def test_pieces_of_other_work_are_thrown_away_and_that_is_said(left, opened, heard):
    with opened(key="other") as kept:
        assert kept.read("a") is None
    assert len(heard.lines) == 1
    assert "other work" in heard.lines[0]


def test_pieces_of_unknown_work_are_thrown_away(left, opened, out):
    (journal_folder(out) / "key").unlink()
    with opened() as kept:
        assert kept.read("a") is None


def test_to_insist_on_resuming_needs_pieces_of_the_same_work(left, opened, out):
    with pytest.raises(UsageError, match="not of this command"), opened("other", Resume.REQUIRED):
        pass
    with opened(resume=Resume.REQUIRED) as kept:
        assert kept.read("a") == b"first"
    with pytest.raises(UsageError, match="no journal"), opened(resume=Resume.REQUIRED):
        pass
    assert not list(out.parent.iterdir())


def test_to_begin_anew_throws_pieces_of_the_same_work_away(left, opened, heard):
    with opened(resume=Resume.NEVER) as kept:
        assert kept.read("a") is None
    assert heard.lines == []  # it was asked for


def test_a_second_process_is_refused_while_the_first_lives(out, opened, heard):
    code = f"""
import pathlib, time
from llmopt import artifact
from llmopt.progress import Silent
with artifact.journal(pathlib.Path({str(out)!r}), "key", artifact.Resume.IF_SAME, Silent()) as kept:
    kept.write("a", b"first")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(ArtifactError, match="another llmopt is writing"), opened():
        pass
    with pytest.raises(ArtifactError, match="another llmopt is writing"):
        artifact.discard_journal(out, heard)
    process.kill()
    process.communicate()
    with opened() as kept:
        assert kept.read("a") == b"first"


def test_a_lock_on_a_journal_that_was_removed_meanwhile_counts_for_nothing(out, opened, monkeypatch):
    """Between opening the folder and locking it, the process that had it may finish and remove it."""
    from llmopt.artifact import journal as module_function

    module = sys.modules[module_function.__module__]
    real, calls = module.fcntl.flock, []

    def late(descriptor, how):
        if not calls:
            journal_folder(out).rmdir()
        calls.append(descriptor)
        real(descriptor, how)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with opened() as kept:
        kept.write("a", b"x")
        assert len(calls) == 2


def test_a_method_without_a_journal_clears_away_what_another_left(left, out, heard):
    artifact.discard_journal(out, heard)
    artifact.discard_journal(out, heard)
    assert not list(out.parent.iterdir())
    assert len(heard.lines) == 1
