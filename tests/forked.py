"""Ranks as real processes that find each other as those of torchrun do, forked from one that has imported torch."""

import multiprocessing
import os
import socket

from llmopt.pipeline.launching.job import read_job, write_job
from llmopt.pipeline.launching.outcome import read_outcome, write_outcome

PATIENCE_S = 60


def run_forked(job, folder):
    """The outcome of a job, in a folder that may be written to."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmopt.pipeline.launching.run"])
    write_job(job, folder / "job.json")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = job.layout.size
    ranks = [context.Process(target=_rank, args=(rank, size, port, folder), daemon=True) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(PATIENCE_S)
    assert [rank.exitcode for rank in ranks] == [0] * size
    return read_outcome(folder / "outcome.safetensors")


def _rank(rank, size, port, folder):
    from llmopt.pipeline.launching.run import outcome_of

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    outcome = outcome_of(read_job(folder / "job.json"), _fail)
    if outcome is not None:
        write_outcome(outcome, folder / "outcome.safetensors")


def _fail(error):
    os._exit(error.exit_code)
