"""The program of a rank: `python -m llmopt.pipeline.launching.worker JOB.json OUTCOME.safetensors`."""

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from llmopt.errors import ExitCode, LlmoptError, debugging

_PARENT_S = 1.0


def main() -> int:
    """Do what the job says; the first rank writes the outcome."""
    # Ctrl-C reaches every process of a terminal: the one that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from llmopt.pipeline.launching.job import read_job  # noqa: PLC0415 (after SIGINT is dealt with)
    from llmopt.pipeline.launching.outcome import write_outcome  # noqa: PLC0415
    from llmopt.pipeline.launching.rank import LostError  # noqa: PLC0415
    from llmopt.pipeline.launching.run import outcome_of  # noqa: PLC0415
    from llmopt.pipeline.launching.supervise import say_why  # noqa: PLC0415

    def fail(error: LlmoptError) -> NoReturn:
        say_why(error)
        os._exit(error.exit_code)

    _end_with(os.getppid())
    job_path, outcome_path = map(Path, sys.argv[1:])
    try:
        outcome = outcome_of(read_job(job_path), fail)
    except LlmoptError as error:
        say_why(error, lost=isinstance(error, LostError))
        return error.exit_code
    except Exception as error:
        if debugging():
            traceback.print_exc()
        what = "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
        say_why(LlmoptError(what, where=f"rank {os.environ['RANK']}", hint="--debug shows the traceback"))
        return ExitCode.FAILED
    if outcome is not None:
        write_outcome(outcome, outcome_path)
    return ExitCode.DONE


def _end_with(parent: int) -> None:
    """End when the process that started this one has, however it did: nobody else would."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_S)
        os._exit(ExitCode.FAILED)

    threading.Thread(target=watch, daemon=True, name="llmopt-parent").start()


if __name__ == "__main__":
    sys.exit(main())
