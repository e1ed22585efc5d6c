import resource
import sys

import numpy as np
import pytest

from llmopt.measure import memory
from llmopt.measure.memory import peak_rss_bytes


def test_the_peak_remembers_memory_that_was_given_back():
    before = peak_rss_bytes()
    np.ones(40_000_000)  # 320 MB, freed at once
    assert peak_rss_bytes() - before > 200e6


def test_linux_gives_its_high_water_mark(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("VmPeak:\t  9999 kB\nVmHWM:\t    1668 kB\nVmRSS:\t    1000 kB\n")
    monkeypatch.setattr(memory, "STATUS", status)
    assert peak_rss_bytes() == 1668 * 1024


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_getrusage_counts_kib_on_linux_and_bytes_on_macos(platform, unit, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_rss_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_a_system_that_does_not_tell_gives_none(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_rss_bytes() is None
