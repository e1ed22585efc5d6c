"""A rank that dies, hangs or fails ends all, by its name, in time."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from llmopt.errors import LlmoptError
from llmopt.partition.runtime.layout import Layout, StageLayout
from llmopt.pipeline.launching.job import Job, write_job
from llmopt.pipeline.launching.run import run_job
from llmopt.pipeline.launching.supervise import run_processes
from tests.partition.ranks import layout_of
from tests.plans import plan_file

NAMED = Layout((StageLayout(first=0, stop=2, devices=("a",)), StageLayout(first=2, stop=4, devices=("b",))))
TIMEOUT_S = 3


def endless(model):
    return Job(model=str(model), layout=NAMED, ids_BT=((1, 2),), output=60, rounds=100_000, timeout_s=TIMEOUT_S)


def strike(rank, number):
    """Send a signal to a rank once all ranks generate."""
    me = psutil.Process()
    while len(found := [child for child in me.children() if busy(child)]) < len(NAMED.stages):
        time.sleep(0.05)
    victim = next(child for child in found if child.environ()["RANK"] == str(rank))
    os.kill(victim.pid, number)


def busy(child):
    """Whether a process has found the others: it has connections to them."""
    try:
        return "RANK" in child.environ() and len(child.net_connections()) > 3
    except psutil.Error:
        return False


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, r"^rank 1 \(stage 1 on b\) was killed by SIGKILL"),
        (signal.SIGSTOP, r"^rank 1 \(stage 1 on b\) has not (answered for|begun within) 3 s"),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_the_run_by_its_name(six_heads, number, told):
    threading.Thread(target=strike, args=(1, number), daemon=True).start()
    start = time.monotonic()
    with pytest.raises(LlmoptError, match=told):
        run_job(endless(six_heads), shares=2)
    assert time.monotonic() - start < 30
    assert [child for child in psutil.Process().children() if busy(child)] == []


def test_the_first_rank_keeps_the_others_together_and_is_named_as_well(six_heads):
    threading.Thread(target=strike, args=(0, signal.SIGSTOP), daemon=True).start()
    with pytest.raises(LlmoptError, match=r"^rank 0 \(stage 0 on a\) has not answered for 3 s"):
        run_job(endless(six_heads), shares=2)


def test_an_error_of_one_rank_is_the_error_of_the_run(six_heads, tmp_path):
    with pytest.raises(LlmoptError, match="there is no such file or folder"):
        run_job(Job(model=str(tmp_path / "nothing"), layout=NAMED, ids_BT=((1,),), output=1, timeout_s=20), shares=2)


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import sys, os; sys.exit(7 * (os.environ['RANK'] == '1'))", "ended with exit code 7 and left no word"),
        ("import time, os; time.sleep(60 * (os.environ['RANK'] == '1'))", "did not end with the others"),
    ],
)
def test_a_rank_that_says_nothing_is_named(tmp_path, program, told):
    with pytest.raises(LlmoptError, match=rf"rank 1 \(stage 1\) {told}"):
        run_processes(layout_of((1, 1), (1, 1)), [sys.executable, "-c", program], tmp_path, 3, shares=2)


ENDLESS = """
import os, sys
from llmopt.partition.runtime.stage import DecoderStage
from llmopt.pipeline.launching import worker

forward = DecoderStage.forward

def endless(self, inputs, state, advance):
    while os.environ["RANK"] == "1":
        pass
    return forward(self, inputs, state, advance)

DecoderStage.forward = endless
sys.exit(worker.main())
"""


def test_a_rank_that_computes_without_an_end_is_named(six_heads, tmp_path):
    write_job(endless(six_heads), tmp_path / "job.json")
    (tmp_path / "failures").mkdir()
    command = [sys.executable, "-c", ENDLESS, str(tmp_path / "job.json"), str(tmp_path / "outcome")]
    with pytest.raises(LlmoptError, match=r"^rank 1 \(stage 1 on b\) has got nowhere for 3 s"):
        run_processes(NAMED, command, tmp_path / "failures", TIMEOUT_S, shares=2)


@pytest.fixture
def launched(six_heads, tmp_path):
    """A launch without an end, as people start it, once its two ranks generate; and their processes."""
    plan = plan_file(tmp_path / "plan.json", six_heads, ((2, 1), (2, 1)), output=50)
    words = ["launch", str(plan), "--rounds", "100000", "--quiet", "--timeout", "20"]
    process = subprocess.Popen([sys.executable, "-m", "llmopt", *words], stderr=subprocess.PIPE, text=True)
    with process:
        me = psutil.Process(process.pid)
        while len(ranks := [child for child in me.children() if busy(child)]) < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        yield process, ranks
        process.kill()


def test_a_killed_rank_ends_the_command_by_its_name(launched):
    process, ranks = launched
    next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
    _, told = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "error: rank 1 (stage 1 on here/cpu:1) was killed by SIGKILL" in told
    assert "Traceback" not in told
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


def test_no_rank_outlives_a_command_that_was_killed(launched):
    process, ranks = launched
    process.kill()
    assert psutil.wait_procs(ranks, timeout=20)[1] == []
