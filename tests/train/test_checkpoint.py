"""Checkpoints in a journal."""

import pytest
import torch

from llmopt.artifact import Journal
from llmopt.train import checkpoint
from llmopt.train.checkpoint import Checkpoints, Snapshot


def snapshot(value):
    tensors = {name: torch.full((4,), float(value)) for name in "abc"}
    return Snapshot(tensors, {"step": value})


def test_the_last_checkpoint_takes_the_place_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 32)  # two tensors a piece
    checkpoints = Checkpoints(Journal(tmp_path))
    assert checkpoints.read() is None
    for step in (1, 2, 10):
        checkpoints.write(step, snapshot(step))
    step, found = checkpoints.read()
    assert (step, found.told) == (10, {"step": 10})
    assert {name: tensor.tolist() for name, tensor in found.tensors.items()} == dict.fromkeys("abc", [10.0] * 4)
    assert checkpoints.journal.names() == ["training-10.0.safetensors", "training-10.1.safetensors", "training-10.json"]


def test_one_that_was_not_finished_is_not_seen(tmp_path, monkeypatch):
    checkpoints = Checkpoints(Journal(tmp_path))
    checkpoints.write(1, snapshot(1))
    write = Journal.write

    def dies(self, name, data):
        if name.endswith(".json"):
            raise OSError(28, "No space left on device")
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", dies)
        with pytest.raises(OSError, match="No space"):
            checkpoints.write(2, snapshot(2))
    assert checkpoints.read()[0] == 1
    checkpoints.write(3, snapshot(3))
    assert len(checkpoints.journal.names()) == 2


def test_a_damaged_one_is_passed_over(tmp_path):
    checkpoints = Checkpoints(Journal(tmp_path))
    checkpoints.write(1, snapshot(1))
    (tmp_path / "training-1.0.safetensors").write_bytes(b"torn")
    assert checkpoints.read() is None


def test_nothing_is_pickled(tmp_path):
    Checkpoints(Journal(tmp_path)).write(1, snapshot(1))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
