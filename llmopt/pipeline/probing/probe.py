"""`llmopt probe`: every rank of this machine measured, alone and with the others, and the links between them."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from llmopt.errors import UsageError
from llmopt.measure.host import describe_host, usable_cores
from llmopt.measure.memory import available_bytes, resident_bytes
from llmopt.partition.runtime.layout import Layout, StageLayout
from llmopt.pipeline.launching.supervise import run_processes
from llmopt.pipeline.launching.warm import warm_up
from llmopt.pipeline.probing.compute import Compute, Working, measure_compute, measure_working
from llmopt.pipeline.probing.links import Link, in_turns, measure_messages, measure_sums
from llmopt.progress import Progress

TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRequest:
    """How many ranks this machine is to be divided into; None: one for each GPU, or else for each core."""

    ranks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProbe:
    """One rank's share of the machine: what it does alone, and while all others do the same."""

    name: str
    is_gpu: bool
    memory_bytes: int
    process_bytes: int
    compute: Compute
    alone: Working
    together: Working


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The machine. All ranks are alike; without a second one there are no links."""

    ranks: int
    device: DeviceProbe
    messages: Link | None
    sums: Link | None


_PROBE = TypeAdapter(Probe)


def probe(request: ProbeRequest, progress: Progress) -> Probe:
    """Measure this machine; takes some half a minute.

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
    process_bytes = resident_bytes()
    compute = measure_compute(device) if rank == 0 else None
    alone = measure_working(device) if rank == 0 else None
    dist.barrier()
    turn = partial(in_turns, rank=rank, device=device) if ranks > 1 else None
    together = measure_working(device, turn)
    dist.barrier()
    messages, sums = (measure_messages(rank, device), measure_sums(device)) if ranks > 1 else (None, None)
    if compute is not None and alone is not None:
        found = DeviceProbe(
            name=_name(device),
            is_gpu=device.type == "cuda",
            memory_bytes=_memory_bytes(device, ranks),
            process_bytes=process_bytes,
            compute=compute,
            alone=alone,
            together=together if ranks > 1 else alone,
        )
        path.write_bytes(_PROBE.dump_json(Probe(ranks=ranks, device=found, messages=messages, sums=sums)))


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
