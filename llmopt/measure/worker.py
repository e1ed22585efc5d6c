"""The measuring process: `python -m llmopt.measure.worker`, one `Job` as JSON on stdin, one `Block` as JSON on stdout.

A fresh process for each block keeps what one variant leaves behind (heap, caches, threads) away from the next. torch
and transformers are never imported here: their memory would be counted as the artifact's.
"""

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from llmopt.engine.base import Engine
from llmopt.errors import ExitCode, LlmoptError, debugging
from llmopt.measure.block import Job, run_block


def open_artifact(path: Path, threads: int) -> Engine:
    """Open an exported artifact, as its users do."""
    from llmopt.engine.ort import OrtEngine  # noqa: PLC0415  # the tests of this file need no onnxruntime

    return OrtEngine(path, threads)


def main(stdin: TextIO, stdout: TextIO, open_engine: Callable[[Path, int], Engine] = open_artifact) -> int:
    """Do the job and give the exit code."""
    job = Job(**json.load(stdin))
    try:
        block = run_block(open_engine(Path(job.path), job.threads), job)
    except LlmoptError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    # Whatever onnxruntime raises: the process that started this one shows its last lines to a person.
    except Exception as error:
        if debugging():
            traceback.print_exception(error)
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return ExitCode.FAILED
    json.dump(asdict(block), stdout, allow_nan=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.stdin, sys.stdout))
