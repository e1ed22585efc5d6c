"""The nearest changes that would let a model fit: each is tried before it is said."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from llmopt.partition.cluster import Cluster, Device
from llmopt.partition.cost import Precision
from llmopt.partition.device import Link
from llmopt.partition.layout import by_permuted_class
from llmopt.partition.settings import Settings
from llmopt.partition.solver.fixed import FixedOrder
from llmopt.partition.ways import ways_in_any_order
from llmopt.quantize.assign import assign
from llmopt.quantize.scheme import parse_scheme
from llmopt.words import counted

_SCHEMES = ("w8a16", "w4a16")
_MOST_MORE = 4096


def remedies(settings: Settings, devices: Sequence[Device]) -> list[str]:
    """What to change: one thing, or fewer bits and fewer tokens together."""
    found = list(_single(settings, devices))
    if not found and not settings.model.precision.schemes:
        fewer = ((name, list(_fewer_tokens(_quantized(settings, name)))) for name in _SCHEMES)
        found = [f"--scheme {name} {tokens[0]}" for name, tokens in fewer if tokens][:1]
    return found


def _single(settings: Settings, devices: Sequence[Device]) -> Iterator[str]:
    if settings.wanted.degree is not None and _fits(replace(settings, wanted=replace(settings.wanted, degree=None))):
        yield "leave --tp out"
    if settings.wanted.order is not None and _fits(replace(settings, wanted=replace(settings.wanted, order=None))):
        yield "leave --order out"
    if not settings.model.precision.schemes:
        fitting = (name for name in _SCHEMES if _fits(_quantized(settings, name)))
        yield from (f"--scheme {name}" for name in list(fitting)[:1])
    yield from _fewer_tokens(settings)
    if settings.wanted.order is None and (more := _more_devices(settings, devices)) is not None:
        yield more


def _fewer_tokens(settings: Settings) -> Iterator[str]:
    work = settings.workload
    batch = _largest(work.batch - 1, lambda many: _fits(replace(settings, workload=replace(work, batch=many))))
    if batch:
        yield f"--batch {batch}"
        return
    prompt = _largest(work.prompt - 1, lambda many: _fits(replace(settings, workload=replace(work, prompt=many))))
    if prompt:
        yield f"--prompt {prompt}"


def _fits(settings: Settings) -> bool:
    """Whether there is room, micro-batches being as small as they can be: in any order, or in a likely one where there
    are too many to go through."""
    devices = settings.devices()
    machine = settings.machine(1, settings.sequences(1), settings.degrees(devices))
    in_order = settings.wanted.order is not None
    if not in_order and (ways := ways_in_any_order(machine, devices)) is not None:
        problem = ways.stepwise("tpot")
        alone = any(math.isfinite(kind.alone()) for kind in problem.kinds)
        return alone or problem.within(problem.longest_s()) is not None
    for order in [devices] if in_order else by_permuted_class(devices):
        kinds, slots = machine.slots(order, "tpot")
        fixed = FixedOrder(kinds=kinds, slots=slots) if kinds else None
        if fixed is not None and (fixed.alone() is not None or fixed.within(fixed.longest_s()) is not None):
            return True
    return False


def _quantized(settings: Settings, name: str) -> Settings:
    found = assign(settings.model.spec, parse_scheme(name))
    schemes = {layer: one.scheme for layer, one in found.items() if one.scheme is not None}
    precision = Precision(dtype=settings.model.precision.dtype, schemes=schemes)
    return replace(settings, model=replace(settings.model, precision=precision))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits; 0 if none does."""
    if most < 1 or not fits(1):
        return 0
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _more_devices(settings: Settings, devices: Sequence[Device]) -> str | None:
    """How many more of the class with the most memory would do, in a node that has one."""
    cluster = settings.cluster
    widest = max(devices, key=lambda device: cluster.device_class(device.kind).usable_bytes)
    # To fit, it does not matter what is too much: what does not is looked for from below.
    count = 1
    while count <= _MOST_MORE and not _fits(replace(settings, cluster=_grown(cluster, widest, count))):
        count *= 2
    if count > _MOST_MORE:
        return None
    low = count // 2
    while count - low > 1:
        middle = (low + count) // 2
        if _fits(replace(settings, cluster=_grown(cluster, widest, middle))):
            count = middle
        else:
            low = middle
    return f"add {counted(count, 'device')} like {widest.kind}"


def _grown(cluster: Cluster, like: Device, more: int) -> Cluster:
    """With a node more, of so many devices."""
    node = cluster.machine(like.node)
    link = node.link or Link(latency_us=0.0, gb_per_s=1.0)  # whether something fits does not depend on it
    added = node.model_copy(update={"name": "more", "count": 1, "devices": {like.kind: more}, "link": link})
    between = cluster.between or link
    return cluster.model_copy(update={"nodes": (*cluster.nodes, added), "between": between})
