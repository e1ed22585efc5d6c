"""A rank that dies, hangs or fails ends all, by its name, in time."""

import os
import signal
import sys
import threading
import time

import psutil
import pytest

from llmopt.errors import LlmoptError
from llmopt.partition.runtime.layout import Layout, StageLayout
from llmopt.pipeline.launching.job import Job
from llmopt.pipeline.launching.run import run_job
from llmopt.pipeline.launching.supervise import run_processes
from tests.partition.ranks import layout_of

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
