"""Activations that memory has no room for come back from the disk as they were, and leave nothing there."""

import errno
import gc
import os
import tempfile

import pytest
import torch

from llmopt.artifact import journal_folder
from llmopt.pipeline import export, spill
from llmopt.pipeline.spill import States, limit_bytes
from tests.whole_way import CommandLine, bytes_of

OPTIONS = ("--scheme", "w4a16", "--method", "smoothquant+gptq", "--calib-tokens", "2048", "--threads", "1")
SHAPES = [(1, 5, 8), (1, 7, 8), (1, 1, 8), (1, 7, 8)]


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def llmopt(capfd):
    return CommandLine(capfd)


@pytest.mark.parametrize("limit", [0, 5 * 8 * 4, 6 * 8 * 4, 10**6])
def test_what_is_put_in_comes_out(tmp_path, limit):
    states, expected = States(limit, tmp_path), tensors()
    states.extend(expected)
    states[3] = expected[3] = expected[3] * 2
    states[0] = expected[0] = expected[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert len(states) == 4
    assert all(torch.equal(found, wanted) for found, wanted in zip(states, expected, strict=True))


def test_what_is_within_the_limit_is_kept_and_the_rest_is_not(tmp_path):
    states, given = States(tensors()[0].nbytes, tmp_path), tensors()
    states.extend(given)
    assert [states[index] is tensor for index, tensor in enumerate(given)] == [True, False, False, False]


def test_the_file_has_no_name_and_goes_with_the_list(tmp_path):
    before = open_files()
    states = States(0, tmp_path)
    states.extend(tensors())
    assert open_files() == before + 1
    assert not list(tmp_path.iterdir())
    del states
    gc.collect()
    assert open_files() == before


def test_a_list_that_fits_opens_no_file(tmp_path):
    before = open_files()
    states = States()
    states.extend(tensors())
    assert open_files() == before


def test_two_lists_have_a_quarter_of_what_is_available(monkeypatch):
    monkeypatch.setattr(spill, "available_bytes", lambda: 8000)
    assert 2 * limit_bytes() == 2000


def test_the_same_bytes_come_of_it(llmopt, tiny_llama, tmp_path, monkeypatch):
    kept, spilled = tmp_path / "kept" / "out", tmp_path / "spilled" / "out"
    for folder in (kept, spilled):
        folder.parent.mkdir()
    assert llmopt("quantize", tiny_llama, "-o", kept, *OPTIONS).code == 0
    opened = []
    anonymous = tempfile.TemporaryFile

    def recorded(**options):
        opened.append(options["dir"])
        return anonymous(**options)

    monkeypatch.setattr(tempfile, "TemporaryFile", recorded)
    monkeypatch.setattr(export, "limit_bytes", lambda: 300_000)
    assert llmopt("quantize", tiny_llama, "-o", spilled, *OPTIONS).code == 0
    assert {folder.parent for folder in opened} == {spilled.parent}
    assert bytes_of(spilled) == bytes_of(kept)
    assert [path.name for path in spilled.parent.iterdir()] == ["out"]


def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_and_leaves_the_journal_alone(llmopt, tiny_llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(export, "limit_bytes", lambda: 0)
    monkeypatch.setattr(spill, "_bytes_of", full)
    ended = llmopt("quantize", tiny_llama, "-o", out, *OPTIONS)
    assert ended.code == 3
    assert "the disk is full" in ended.err
    assert "of activations" in ended.err
    assert "--calib-tokens" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == [journal_folder(out).name]
