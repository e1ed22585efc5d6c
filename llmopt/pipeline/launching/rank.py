"""What one rank does: join the others, take its part of the model, generate a few times, and tell the first."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from llmopt.errors import LlmoptError
from llmopt.measure.memory import peak_rss_bytes, resident_bytes
from llmopt.partition.runtime.layout import Layout, Seat
from llmopt.partition.runtime.schedule import Generated, Pipeline, Stage
from llmopt.partition.runtime.trace import Spent, Trace
from llmopt.partition.runtime.watch import Watch
from llmopt.partition.runtime.wire import Wire
from llmopt.pipeline.launching.job import Job
from llmopt.pipeline.launching.warm import warm_up

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_MEETING = timedelta(minutes=1)  # between the first that has started and the last: a cold disk is slow to import torch

Fail = Callable[[LlmoptError], None]
Build = Callable[[Seat, Wire, Callable[[], None]], tuple[Stage, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One generation as a rank saw it: when each token was back (first stage only), and what each phase took."""

    ended_s: tuple[float, ...]
    phases: tuple[Spent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What a rank tells the first. Memory of a process grows from `start_bytes`, before it has any weights."""

    rank: int
    weight_bytes: int
    start_bytes: int
    peak_bytes: int | None
    load_s: float
    rounds: tuple[Round, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the first rank knows in the end: the tokens [B, T], the logits [B, T, V] if kept, and all reports."""

    ids_BT: Tensor
    logits_BTV: Tensor | None
    reports: tuple[RankReport, ...]


def run_rank(job: Job, build: Build, fail: Fail) -> Outcome | None:
    """Do this process's share of a job; the first rank gets the outcome.

    Args:
        job: the same on all ranks.
        build: makes the stage of a seat, and says how many bytes its weights take.
        fail: ends this process, from another thread, when a rank does not get on.

    Raises:
        LlmoptError: another rank cannot be reached any more.
    """
    trace, layout = Trace(), job.layout
    with _joined(layout, job, trace, fail) as (rank, device):
        if device.type == "cuda":
            trace.settle = torch.cuda.synchronize
        seat = layout.seat(rank)
        with _losing(layout, trace):
            wire = Wire(layout, seat, device, trace)
        warm_up(device)
        start_bytes, start = _held_bytes(device), time.perf_counter()
        stage, weight_bytes = build(seat, wire, trace.advance)
        load_s = time.perf_counter() - start
        with _losing(layout, trace), torch.inference_mode():
            rounds, generated = _rounds(Pipeline(stage, wire, trace), trace, job, device)
            report = RankReport(
                rank=rank,
                weight_bytes=weight_bytes,
                start_bytes=start_bytes,
                peak_bytes=_peak_bytes(device),
                load_s=load_s,
                rounds=rounds,
            )
            return _collected(report, generated, layout.size)


def _rounds(pipeline: Pipeline, trace: Trace, job: Job, device: torch.device) -> tuple[tuple[Round, ...], Generated]:
    ids_BT = torch.tensor(job.ids_BT, dtype=torch.int64, device=device)
    rounds = []
    for number in range(job.rounds + 1):
        with trace.wait_for("the other ranks"):
            dist.barrier()
        trace.phases = [Spent()]
        keep = job.keep_logits and number == job.rounds
        generated = pipeline.generate(ids_BT, job.output, job.cut, keep_logits=keep)
        rounds.append(Round(ended_s=generated.ended_s, phases=tuple(trace.phases)))
    return tuple(rounds[1:]), generated


def _collected(report: RankReport, generated: Generated, size: int) -> Outcome | None:
    logits_BTV = generated.logits_BTV
    mine = (report, None if logits_BTV is None else logits_BTV.float().cpu())
    found: list[tuple[RankReport, Tensor | None] | None] | None = [None] * size if report.rank == 0 else None
    dist.gather_object(mine, found)
    dist.barrier()
    if found is None:
        return None
    assert generated.ids_BT is not None, "the first rank is of the first stage"
    told = [entry for entry in found if entry is not None]
    parts = [logits for _, logits in told if logits is not None]
    return Outcome(
        ids_BT=generated.ids_BT.cpu(),
        logits_BTV=torch.cat(parts, -1) if parts else None,
        reports=tuple(each for each, _ in told),
    )


@contextmanager
def _joined(layout: Layout, job: Job, trace: Trace, fail: Fail) -> Iterator[tuple[int, torch.device]]:
    store, rank, device = _connect(layout, job.timeout_s)
    watch = Watch(store, layout, rank, trace, timeout_s=job.timeout_s, fail=fail)
    watch.start()
    try:
        yield rank, device
        watch.stop()
    finally:
        dist.destroy_process_group()


def _connect(layout: Layout, timeout_s: float) -> tuple["Store", int, torch.device]:
    patience, device = timedelta(seconds=timeout_s), rank_device()
    try:
        store, rank, size = next(rendezvous("env://", timeout=max(patience, _MEETING)))
        if size != layout.size:
            raise LlmoptError(
                f"{size} processes were started, and the plan has {layout.size} ranks",
                hint=f"torchrun --nproc-per-node {layout.size}, or as many on all machines together",
            )
        # The watch is what notices; this is only for the case that it does not.
        dist.init_process_group(_backend(device), store=store, rank=rank, world_size=size, timeout=2 * patience)
    except RuntimeError as error:
        raise LlmoptError(
            f"the ranks do not find each other: {error}",
            hint="GLOO_SOCKET_IFNAME names the network interface to use",
        ) from error
    return store, rank, device


def rank_device() -> torch.device:
    """The GPU of this rank; a CPU where there is none."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local) if local < torch.cuda.device_count() else torch.device("cpu")


@contextmanager
def _losing(layout: Layout, trace: Trace) -> Iterator[None]:
    """All that torch.distributed says is that a connection was closed, or that nobody answered."""
    try:
        yield
    except RuntimeError as error:
        if not trace.waiting:
            raise
        raise LostError(f"the connection to {trace.waiting} was lost", hint="torchrun says how a rank ended") from error


class LostError(LlmoptError):
    """Another rank has ended; whoever started it knows more."""


def _backend(device: torch.device) -> str:
    if device.type != "cuda":
        return "gloo"
    torch.cuda.set_device(device)
    return "cpu:gloo,cuda:nccl"


def _held_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()
