import json
import os
import subprocess
import sys

from llmopt.measure import host
from llmopt.measure.host import describe_host, load_average, usable_cores, versions


def test_the_host_is_described_in_json_and_the_same_each_time():
    described = describe_host(threads=2)
    assert json.loads(json.dumps(described)) == described == describe_host(threads=2)
    assert described["threads"] == 2
    assert described["memory_bytes"] > 2**20
    assert 1 <= described["usable_cores"] <= os.cpu_count()


def test_instruction_sets_and_model_are_read_from_cpuinfo(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 3GHz\nflags\t\t: fpu sse avx2 avx512_vnni xsave\n")
    monkeypatch.setattr(host, "CPUINFO", cpuinfo)
    described = describe_host(1)
    assert (described["cpu"], described["isa"]) == ("Some CPU @ 3GHz", ["avx2", "avx512_vnni"])


def test_arm_calls_its_flags_features(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    monkeypatch.setattr(host, "CPUINFO", cpuinfo)
    assert describe_host(1)["isa"] == ["asimd", "asimddp", "i8mm"]


def test_what_the_system_does_not_tell_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(host, "GOVERNOR", tmp_path / "none")
    described = describe_host(1)
    assert described["isa"] is None
    assert described["governor"] is None


def test_versions_are_read_without_importing_what_is_heavy():
    code = (
        "import sys; from llmopt.measure.host import versions; assert 'numpy' in versions();"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_packages_that_are_missing_are_left_out(monkeypatch):
    monkeypatch.setattr(host, "PACKAGES", ("numpy", "there-is-no-such-package"))
    assert set(versions()) == {"python", "numpy"}


def test_a_system_without_load_averages_gives_none(monkeypatch):
    assert load_average() >= 0
    monkeypatch.delattr(os, "getloadavg")
    assert load_average() is None


def test_a_pinned_process_counts_its_own_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert usable_cores() == 1
