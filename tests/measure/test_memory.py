import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llmopt.measure import memory
from llmopt.measure.memory import peak_rss_bytes


def test_the_peak_remembers_memory_that_was_given_back():
    """In a process of its own: what ran before in this one may have left a peak that nothing here reaches."""
    code = (
        "from llmopt.measure.memory import peak_rss_bytes; before = peak_rss_bytes();"
        "b'x' * 100_000_000; print(peak_rss_bytes() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 90e6


def test_linux_gives_its_high_water_mark(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("VmPeak:\t  9999 kB\nVmHWM:\t    1668 kB\nVmRSS:\t    1000 kB\n")
    monkeypatch.setattr(memory, "STATUS", status)
    assert peak_rss_bytes() == 1668 * 1024


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_getrusage_counts_kib_on_linux_and_bytes_on_macos(platform, unit, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    assert peak_rss_bytes() == 5000 * unit


def test_a_system_that_does_not_tell_gives_none(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_rss_bytes() is None
