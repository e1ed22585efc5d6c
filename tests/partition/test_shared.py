"""Sums through shared memory: the same bits for all, whatever their sizes, and a way back where there is none."""

import mmap
import platform
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from llmopt.partition.runtime import shared
from llmopt.partition.runtime.shared import SharedPlaces, shared_places
from llmopt.partition.runtime.sums import Sums

ORDERED = pytest.mark.skipif(platform.machine() not in shared._ORDERED, reason="stores may be seen out of order")


@pytest.fixture
def alone(tmp_path):
    """One process that is a group."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@ORDERED
@pytest.mark.parametrize("count", [2, 3])
def test_all_have_the_same_sums_one_message_after_the_other(count):
    memory = mmap.mmap(-1, shared._size(count))
    draw = torch.Generator().manual_seed(0)
    sizes = [(7,), (3, 5), (1,), (300_000,), (2, 2)] * 8  # the fourth takes more than one place
    messages = [[torch.randn(size, generator=draw) for size in sizes] for _ in range(count)]

    def one(index):
        places = SharedPlaces(memory, index, count)
        sums = [message.clone() for message in messages[index]]
        largest = [message.clone() for message in messages[index]]
        for number in range(len(sizes)):
            places.combine(sums[number])
            places.combine(largest[number], torch.maximum)
        return sums, largest

    with ThreadPoolExecutor(count) as threads:
        found = list(threads.map(one, range(count)))
    for number, same in enumerate(zip(*messages, strict=True)):
        total = torch.stack(same)
        for sums, largest in found:
            assert torch.allclose(sums[number], total.sum(0), atol=1e-6)
            assert torch.equal(sums[number], found[0][0][number])
            assert torch.equal(largest[number], total.amax(0))


@ORDERED
def test_whole_numbers_and_other_dtypes_are_added_too():
    memory = mmap.mmap(-1, shared._size(1))
    places = SharedPlaces(memory, 0, 1)
    for dtype in (torch.int64, torch.bfloat16, torch.float64):
        values = torch.tensor([3, -4], dtype=dtype)
        places.combine(values)
        assert values.tolist() == [3, -4]


@ORDERED
def test_nothing_is_left_where_the_memory_was(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "FOLDER", tmp_path / "memory")
    (tmp_path / "memory").mkdir()
    assert shared_places([0], dist.group.WORLD) is not None
    assert list((tmp_path / "memory").iterdir()) == []


@pytest.mark.parametrize("name", ["FOLDER", "_ORDERED", "posix_fallocate"])
def test_without_memory_to_share_there_is_none(alone, tmp_path, monkeypatch, name):
    def full(*_):
        raise OSError(28, "No space left on device")

    if name == "posix_fallocate":
        monkeypatch.setattr(shared.os, name, full)
    else:
        monkeypatch.setattr(shared, name, tmp_path / "no folder" if name == "FOLDER" else ())
    assert shared_places([0], dist.group.WORLD) is None


def test_sums_are_those_of_the_group_where_nothing_is_shared(alone):
    sums = Sums([0], dist.group.WORLD, torch.device("cpu"))
    values = torch.tensor([1.5, -2.0])
    sums.add_up(values)
    sums.largest(values)
    assert values.tolist() == [1.5, -2.0]
