"""From a job to its outcome: in one rank, and in all ranks of this machine."""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.recurrent import is_recurrent, recurrent_spec
from llmopt.model.spec import ModelSpec
from llmopt.partition.runtime.layout import Seat
from llmopt.partition.runtime.recurrent import RecurrentStage
from llmopt.partition.runtime.schedule import Stage
from llmopt.partition.runtime.stage import DecoderStage
from llmopt.partition.runtime.wire import Wire
from llmopt.pipeline.launching.job import Job, write_job
from llmopt.pipeline.launching.outcome import read_outcome
from llmopt.pipeline.launching.rank import Outcome, run_rank
from llmopt.pipeline.launching.reading import AsStored, Reading, RoundedAsRead
from llmopt.pipeline.launching.shards import Shard
from llmopt.pipeline.launching.supervise import run_processes
from llmopt.pipeline.launching.weights import parse_schemes, rank_linears, read_weights
from llmopt.pipeline.stored import open_model
from llmopt.pipeline.stored_weights import open_stored
from llmopt.quantize.scheme import parse_scheme

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_job(job: Job, *, shares: int | None) -> Outcome:
    """Start the ranks of a job on this machine, and wait for what they find; see `run_processes` for `shares`.

    Raises:
        LlmoptError: one of them failed, died, or did not get on; it is named, and all have ended.
    """
    with TemporaryDirectory(prefix="llmopt-launch-") as name:
        folder = Path(name)
        (folder / "failures").mkdir()
        write_job(job, folder / "job.json")
        module = "llmopt.pipeline.launching.worker"
        command = [sys.executable, "-m", module, str(folder / "job.json"), str(folder / "outcome.safetensors")]
        run_processes(job.layout, command, folder / "failures", job.timeout_s, shares=shares)
        return read_outcome(folder / "outcome.safetensors")


def outcome_of(job: Job, fail: Callable[[LlmoptError], None]) -> Outcome | None:
    """What this process, one rank of several, does of a job; see `run_rank`."""
    if is_recurrent(job.model):
        return run_rank(job, partial(_recurrent_stage, job), fail)
    spec = open_model(job.shards or job.model, revision=job.revision, weights=False).spec
    return run_rank(job, partial(_decoder_stage, job, spec), fail)


def _decoder_stage(job: Job, spec: ModelSpec, seat: Seat, wire: Wire, advance: Callable[[], None]) -> tuple[Stage, int]:
    def placed(values: Tensor) -> Tensor:
        advance()
        return values.to(wire.device, DTYPES[job.dtype])

    schemes = parse_schemes(spec, job.schemes)
    with _reading(job, seat) as reading:
        cuts = DecoderStage.cuts(spec, job.layout, seat)
        weights = read_weights(cuts, reading, schemes, placed, symmetric=job.symmetric)
    cut = job.layout.stages[seat.stage].degree > 1
    stage = DecoderStage(
        spec,
        job.layout,
        seat,
        weights.floats,
        wire,
        capacity=job.capacity,
        device=wire.device,
        linears=rank_linears(weights, agree=wire.largest if cut else None),
    )
    return stage, weights.nbytes


def _recurrent_stage(job: Job, seat: Seat, wire: Wire, advance: Callable[[], None]) -> tuple[Stage, int]:
    stage = RecurrentStage(recurrent_spec(job.model), job.layout, seat)
    return stage, stage.weight_bytes


@contextmanager
def _reading(job: Job, seat: Seat) -> Iterator[Reading]:
    if job.shards is not None:
        with closing(Shard(Path(job.shards), job.layout, job.plan_hash, seat.rank)) as shard:
            yield shard
        return
    source = open_model(job.model, revision=job.revision)
    if job.stored is not None:
        schemes = {name: parse_scheme(text) for name, text in job.schemes.items()}
        with open_stored(source, schemes) as stored:
            yield AsStored(stored)
        return
    with open_checkpoint(source) as checkpoint:
        yield RoundedAsRead(checkpoint)
