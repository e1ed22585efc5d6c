import io
import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np

from llmopt.errors import ArtifactError
from llmopt.measure import worker
from llmopt.measure.block import Block, Job


class Instant:
    name, vocab_size = "instant 1", 4

    def stream(self, capacity):
        return self

    def feed(self, ids_T):
        return np.zeros(4, np.float32)


def run(open_engine):
    job = Job(path="some/where", threads=2, prompt_ids=[1], continuation_ids=[2], repetitions=2)
    stdout = io.StringIO()
    code = worker.main(io.StringIO(json.dumps(asdict(job))), stdout, open_engine)
    return code, stdout.getvalue()


def test_a_job_in_is_a_block_out():
    opened = []
    code, stdout = run(lambda path, threads: opened.append((str(path), threads)) or Instant())
    block = Block(**json.loads(stdout))
    assert code == 0
    assert opened == [("some/where", 2)]
    assert len(block.ttft_ms) == len(block.tpot_ms) == 2


def test_an_artifact_that_does_not_open_is_an_exit_code_and_a_reason(capsys):
    def refuse(path, threads):
        raise ArtifactError("there is no model.onnx", where=str(path))

    assert run(refuse) == (3, "")
    assert "no model.onnx" in capsys.readouterr().err


def test_what_nobody_foresaw_is_a_line_and_a_traceback_only_for_those_who_want_one(capsys, monkeypatch):
    def break_(path, threads):
        raise RuntimeError("Got invalid dimensions")

    assert run(break_) == (3, "")
    assert capsys.readouterr().err == "RuntimeError: Got invalid dimensions\n"
    monkeypatch.setenv("LLMOPT_DEBUG", "1")
    run(break_)
    assert "Traceback" in capsys.readouterr().err


def test_the_worker_imports_neither_torch_nor_transformers():
    code = (
        "import sys, llmopt.measure.worker, llmopt.engine.ort;"
        "print(sorted({'torch', 'transformers', 'onnx', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
