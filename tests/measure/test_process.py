import os
import signal
import sys
import threading
import time

import pytest

from llmopt.errors import LlmoptError
from llmopt.measure.block import Block, Job
from llmopt.measure.process import run_worker

JOB = Job(path="some/artifact", threads=1, prompt_ids=[3], repetitions=2)


def script(text):
    return [sys.executable, "-c", text]


def test_the_job_goes_in_as_json_and_the_block_comes_out():
    echo = script(
        "import json, sys; job = json.load(sys.stdin);"
        "print(json.dumps({'engine': job['path'], 'vocab_size': 7, 'ttft_ms': job['prompt_ids'], 'tpot_ms': []}))"
    )
    assert run_worker(JOB, 60, echo) == Block(engine="some/artifact", vocab_size=7, ttft_ms=[3], tpot_ms=[])


def test_a_dead_process_is_an_error_with_its_last_words():
    with pytest.raises(LlmoptError, match=r"exit code 3\nthe last words") as caught:
        run_worker(JOB, 60, script("import sys; sys.stderr.write('the last words\\n'); sys.exit(3)"))
    assert caught.value.where == "some/artifact"


def test_a_killed_process_names_the_signal_and_the_likely_cause():
    with pytest.raises(LlmoptError, match="killed by signal 9") as caught:
        run_worker(JOB, 60, script("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert "memory" in caught.value.hint


@pytest.mark.parametrize("answer", ["", "no json", "[]", '{"engine": "only"}'])
def test_an_answer_that_is_no_block_is_an_error(answer):
    with pytest.raises(LlmoptError, match="gave no result"):
        run_worker(JOB, 60, script(f"print({answer!r})"))


def test_a_process_that_takes_too_long_is_killed():
    with pytest.raises(LlmoptError, match=r"no answer within 0\.2 s"):
        run_worker(JOB, 0.2, script("import time; time.sleep(60)"))


def test_ctrl_c_kills_the_process(tmp_path):
    """The child ignores the interrupt itself, so only a parent that kills it ends it."""
    pid_file = tmp_path / "pid"
    stubborn = script(
        "import os, pathlib, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )

    def interrupt():
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_worker(JOB, 60, stubborn)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
