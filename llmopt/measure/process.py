"""Start a measuring process, hand it its job, and take its answer or its last words."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from llmopt.errors import LlmoptError
from llmopt.measure.block import Block, Job

WORKER = (sys.executable, "-m", "llmopt.measure.worker")
TAIL_LINES = 8


def run_worker(job: Job, timeout_s: float, command: Sequence[str] = WORKER) -> Block:
    """Run one job in a fresh process. The process does not outlive this call, whatever ends it.

    Raises:
        LlmoptError: the process failed, was killed, said something else than a block, or took too long.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace") as process:
        try:
            stdout, stderr = process.communicate(json.dumps(asdict(job)), timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise LlmoptError(
                f"the measuring process gave no answer within {timeout_s:g} s",
                where=job.path,
                hint="ask for fewer repetitions or tokens, or allow more time",
            ) from error
        finally:
            # Does nothing to one that has ended; after Ctrl-C or a timeout it leaves no process and no zombie behind.
            process.kill()
            process.wait()
    if process.returncode:
        raise _failure(job, process.returncode, stderr)
    try:
        return Block(**json.loads(stdout))
    except (ValueError, TypeError) as error:
        raise LlmoptError(f"the measuring process gave no result: {stdout[-200:]!r}", where=job.path) from error


def _failure(job: Job, returncode: int, stderr: str) -> LlmoptError:
    tail = "\n".join(stderr.strip().splitlines()[-TAIL_LINES:])
    if returncode < 0:
        what = f"the measuring process was killed by signal {-returncode}"
        hint = "when memory runs out the system kills with signal 9: close other programs or measure a smaller model"
    else:
        what, hint = f"the measuring process failed with exit code {returncode}", None
    return LlmoptError(f"{what}\n{tail}" if tail else what, where=job.path, hint=hint)
