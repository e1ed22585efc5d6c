import resource
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from llmopt.measure import memory
from llmopt.measure.memory import available_bytes, peak_rss_bytes, resident_bytes


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


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Two control groups, one in the other, in the inner of which this process is."""
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    (tmp_path / "cgroup").write_text("0::/outer/inner\n")
    (tmp_path / "groups" / "outer" / "inner").mkdir(parents=True)
    return tmp_path / "groups"


def limit(group, most, used, files=0):
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\nactive_file 7\ninactive_file {files}\n")


def test_a_control_group_leaves_what_is_below_its_limit_and_the_pages_of_files(groups):
    limit(groups / "outer" / "inner", 5000, 1500, files=300)
    assert available_bytes() == 3800


@pytest.mark.parametrize(("outer", "left"), [(2000, 1000), (9000, 3500), ("max", 3500)])
def test_the_tightest_of_the_groups_around_counts(groups, outer, left):
    limit(groups / "outer", outer, 1000)
    limit(groups / "outer" / "inner", 5000, 1500)
    assert available_bytes() == left


def test_a_group_above_its_limit_leaves_nothing(groups):
    limit(groups / "outer" / "inner", 1000, 1500)
    assert available_bytes() == 0


def test_without_limits_all_that_the_system_has_is_available(groups):
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_what_is_resident_now_is_not_above_the_peak():
    assert 0 < resident_bytes() <= peak_rss_bytes()
