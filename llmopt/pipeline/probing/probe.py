"""`llmopt probe`: every rank of this machine measured, alone and with the others, and the links between them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil
import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from llmopt.errors import UsageError
from llmopt.measure.host import describe_host, usable_cores
from llmopt.measure.memory import available_bytes, resident_bytes
from llmopt.partition.device import MANY_TOKENS
from llmopt.partition.runtime.layout import Layout, StageLayout
from llmopt.partition.runtime.sums import Sums
from llmopt.pipeline.launching.supervise import run_processes
from llmopt.pipeline.launching.warm import warm_up
from llmopt.pipeline.probing.blocks import FLOAT, SIZES, Size, Stack, slack
from llmopt.pipeline.probing.compute import (
    Compute,
    Multiplied,
    Passed,
    block_kinds,
    block_seconds,
    computing,
    kinds,
    product_seconds,
)
from llmopt.pipeline.probing.links import Link, Turns, in_turns, line, message_seconds, sum_seconds
from llmopt.pipeline.probing.timing import SWEEPS, medians
from llmopt.progress import Progress

TIMEOUT_S = 60.0
_LONG = 5  # times as long as other measurements: side by side, speeds come and go
_IN_A_TURN = 6  # blocks
_SEEN = 256  # tokens, the new ones among them


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRequest:
    """How many ranks this machine is to be divided into; None: one for each GPU, or else for each core."""

    ranks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a rank keeps of its speed while all others work, with many tokens and with one; what waking takes it."""

    many: float
    one: float
    waking_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProbe:
    """One rank's share of the machine: what it does alone, and what it keeps of that."""

    name: str
    is_gpu: bool
    memory_bytes: int
    process_bytes: int
    compute: Compute
    kept: Kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The machine. All ranks are alike; without a second one there are no links."""

    ranks: int
    device: DeviceProbe
    messages: Link | None
    sums: Link | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sweep:
    """Seconds: of products and blocks of a rank alone; of a block with so many tokens, alone and beside all others; of
    messages and sums of so many bytes; in turns with another rank.
    """

    products: Mapping[Multiplied, float]
    blocks: Mapping[Passed, float]
    alone: Mapping[int, float]
    together: Mapping[int, float]
    messages: Mapping[int, float]
    sums: Mapping[int, float]
    turns: Turns | None


_PROBE = TypeAdapter(Probe)


def probe(request: ProbeRequest, progress: Progress) -> Probe:
    """Measure this machine; takes a minute and a half.

    Raises:
        UsageError: there are fewer cores or GPUs than ranks.
        LlmoptError: a rank failed.
    """
    most = torch.cuda.device_count() or usable_cores()
    ranks = most if request.ranks is None else request.ranks
    if ranks > most:
        raise UsageError(f"{ranks} ranks, where there are {most} devices", where="--ranks", hint="give fewer")
    layout = Layout((StageLayout(first=0, stop=0, degree=ranks),))
    with TemporaryDirectory(prefix="llmopt-probe-") as name, progress.task(f"measuring this machine as {ranks}"):
        folder = Path(name)
        (folder / "failures").mkdir()
        command = [sys.executable, "-m", "llmopt.pipeline.probing.worker", str(folder / "probe.json")]
        run_processes(layout, command, folder / "failures", TIMEOUT_S, shares=ranks)
        return _PROBE.validate_json((folder / "probe.json").read_bytes())


def probe_rank(rank: int, ranks: int, device: torch.device, path: Path) -> None:
    """What one rank does of it; the first writes what was found."""
    warm_up(device)
    process_bytes, memory_bytes = resident_bytes(), _memory_bytes(device, ranks)
    with torch.inference_mode():
        # Memory first, while the process has no other use for it.
        slacks = {kind: slack(kind) if device.type == "cpu" else 0.0 for kind in kinds(device)}
        wanted = product(block_kinds(device) if rank == 0 else [FLOAT], SIZES if rank < 2 else SIZES[:1])
        stacks = {(kind, size): Stack(size, kind, device) for kind, size in wanted}
        sums = Sums(range(ranks), dist.group.WORLD, device)
        sweeps = [_sweep(rank, sums, device, stacks) for _ in range(SWEEPS)]
    if rank == 0:
        found = DeviceProbe(
            name=_name(device),
            is_gpu=device.type == "cuda",
            memory_bytes=memory_bytes,
            process_bytes=process_bytes,
            compute=computing(medians(one.products for one in sweeps), medians(one.blocks for one in sweeps), slacks),
            kept=_kept(sweeps),
        )
        links = (_messages(sweeps), line(medians(one.sums for one in sweeps))) if ranks > 1 else (None, None)
        path.write_bytes(_PROBE.dump_json(Probe(ranks=ranks, device=found, messages=links[0], sums=links[1])))


def _sweep(rank: int, sums: Sums, device: torch.device, stacks: Mapping[tuple[str, Size], Stack]) -> _Sweep:
    small, large = (stacks.get((FLOAT, size)) for size in SIZES)
    assert small is not None, "every rank has it"

    def seconds() -> dict[int, float]:
        return {tokens: small.seconds(tokens, _SEEN - tokens, _LONG) for tokens in (1, MANY_TOKENS)}

    products = dict(product_seconds(device)) if rank == 0 else {}
    blocks, alone = (dict(block_seconds(stacks)), seconds()) if rank == 0 else ({}, {})
    dist.barrier()
    together = seconds()
    dist.barrier()
    several = dist.get_world_size() > 1
    return _Sweep(
        products=products,
        blocks=blocks,
        alone=alone,
        together=together,
        messages=message_seconds(rank, device) if several else {},
        sums=sum_seconds(sums, small.few(1, _SEEN), device) if several else {},
        turns=in_turns(large.few(_IN_A_TURN, _SEEN) if large else list, rank, device) if several else None,
    )


def _kept(sweeps: Sequence[_Sweep]) -> Kept:
    # Within a sweep one is measured soon behind the other.
    many, one = (median(each.alone[tokens] / each.together[tokens] for each in sweeps) for tokens in (MANY_TOKENS, 1))
    waking = [each.turns.waking_s for each in sweeps if each.turns is not None]
    return Kept(many=min(1.0, many), one=min(1.0, one), waking_s=max(0.0, median(waking or [0.0])))


def _messages(sweeps: Sequence[_Sweep]) -> Link:
    """A message, to a rank that sleeps until it comes."""
    awake = line(medians(one.messages for one in sweeps))
    sleeping_s = median(one.turns.message_s for one in sweeps if one.turns is not None)
    return replace(awake, latency_s=max(awake.latency_s, sleeping_s))


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = describe_host(1)["cpu"] or "CPU"
    cores = usable_cores()
    return f"{cpu}, {cores} {'core' if cores == 1 else 'cores'}"


def _memory_bytes(device: torch.device, ranks: int) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return min(available_bytes(), psutil.virtual_memory().total) // ranks
