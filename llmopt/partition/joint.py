"""Schemes of the blocks chosen together with where they stand: the least loss for which every stage fits. Exact.

What a scheme costs a block is estimated without weights, as the mean squared rounding error of uniform steps, weights
times 4^-bits (Bennett 1948). Blocks of one shape are alike, so a device is described by the least loss with which so
many of them fit; device by device, that gives the least for all.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import product

import numpy as np

from llmopt.errors import BudgetError, UnsupportedError
from llmopt.model.spec import ModelSpec
from llmopt.partition.cluster import Cluster
from llmopt.partition.cost import Costs, Precision, cut
from llmopt.partition.machine import Machine
from llmopt.partition.plan import Workload
from llmopt.partition.problem import Array
from llmopt.quantize.assign import assign
from llmopt.quantize.scheme import Scheme, parse_scheme

SCHEMES = ("w8a16", "w4a16")
Choice = tuple[float, float, Scheme | None]  # bytes, loss, scheme


def choose_schemes(spec: ModelSpec, cluster: Cluster, workload: Workload, precision: Precision) -> Precision:
    """A scheme, or none, for every block, and 8 bits for the tables if anything is quantized.

    Raises:
        BudgetError: the model does not fit in the scheme with the fewest bits.
        UnsupportedError: its blocks are not all of one shape.
    """
    if len({tuple(one.weight.shape for one in block.linears()) for block in spec.blocks}) > 1:
        raise UnsupportedError("the blocks are not all of one shape", where="--joint", hint="give --scheme")
    for tables in (False, True):
        schemes = _tables(spec) if tables else {}
        base = Precision(dtype=precision.dtype, schemes=schemes)
        choices = _choices(spec, base, cluster, workload)
        devices = _capacities(spec, base, cluster, workload)
        counts = least_loss(choices, len(spec.blocks), *devices)
        if counts is not None and (tables or counts[0] == len(spec.blocks)):
            return _named(spec, base, choices, counts)
    raise BudgetError("the model does not fit with any scheme", hint="add devices, or lower --batch or --prompt")


def least_loss(
    choices: Sequence[Choice], blocks: int, rooms: Sequence[float], ends: tuple[float, float]
) -> list[int] | None:
    """How many blocks get each choice, so that the loss is least; None where they do not fit.

    Args:
        choices: bytes and loss of a block.
        blocks: how many there are.
        rooms: bytes of each device.
        ends: bytes that the embedding takes of the first device in use and the head of the last.
    """
    best: list[int] | None = None
    best_loss = np.inf
    for first, last in product(_distinct(rooms), repeat=2):
        left = list(rooms)
        left.remove(first)
        alone = not left
        if (alone and last != first) or (not alone and last not in left):
            continue
        ended = [first - sum(ends)] if alone else [first - ends[0], last - ends[1]]
        if not alone:
            left.remove(last)
        loss, counts = _fill(choices, blocks, [*ended, *left])
        if loss < best_loss:
            best, best_loss = counts, loss
    return best


def _fill(choices: Sequence[Choice], blocks: int, rooms: Sequence[float]) -> tuple[float, list[int]]:
    losses = np.full(blocks + 1, np.inf)
    losses[0] = 0.0
    taken: list[tuple[list[list[int]], Array]] = []
    known: dict[float, tuple[Array, list[list[int]]]] = {}
    for room in rooms:
        if room not in known:
            known[room] = _device(choices, blocks, room)
        device, chosen = known[room]
        joined = np.array(
            [losses[: count + 1][::-1] + device[: count + 1] for count in range(blocks + 1)], dtype=object
        )
        picks = np.array([int(np.argmin(one)) for one in joined])
        losses = np.array([one[pick] for one, pick in zip(joined, picks, strict=True)], dtype=float)
        taken.append((chosen, picks))
    if not np.isfinite(losses[blocks]):
        return np.inf, []
    counts, left = [0] * len(choices), blocks
    for chosen, picks in reversed(taken):
        many = int(picks[left])
        counts = [one + more for one, more in zip(counts, chosen[many], strict=True)]
        left -= many
    return float(losses[blocks]), counts


def _device(choices: Sequence[Choice], blocks: int, room: float) -> tuple[Array, list[list[int]]]:
    """The least loss with which so many blocks fit on a device, [blocks + 1], and how many get each choice then."""
    losses, chosen = np.full(blocks + 1, np.inf), [[0] * len(choices) for _ in range(blocks + 1)]
    counts = np.stack(np.meshgrid(*[np.arange(blocks + 1)] * (len(choices) - 1), indexing="ij")).reshape(
        len(choices) - 1, -1
    )
    for many in range(blocks + 1):
        rest = many - counts.sum(axis=0)
        every = np.vstack([rest, counts])[:, rest >= 0]
        sizes = np.array([choice[0] for choice in choices]) @ every
        loss = np.where(sizes <= room, np.array([choice[1] for choice in choices]) @ every, np.inf)
        pick = int(loss.argmin())
        losses[many] = loss[pick]
        chosen[many] = every[:, pick].tolist()
    return losses, chosen


def _distinct(rooms: Sequence[float]) -> list[float]:
    return list(Counter(rooms))


def _choices(spec: ModelSpec, base: Precision, cluster: Cluster, workload: Workload) -> list[Choice]:
    """No scheme first, then those of fewer and fewer bytes."""
    weights = sum(one.weight.count for one in spec.blocks[0].linears())
    found: list[Choice] = []
    for scheme in (None, *map(parse_scheme, SCHEMES)):
        names = {} if scheme is None else {one.name: scheme for block in spec.blocks for one in block.linears()}
        machine = _machine(spec, Precision(dtype=base.dtype, schemes={**base.schemes, **names}), cluster, workload)
        costs = machine.item_costs(machine.group(cluster.all_devices()[0], 1))
        size = float((costs.weight_bytes + costs.kv_bytes)[1:-1].max()) if len(spec.blocks) > 1 else 0.0
        group = scheme.group_size or 1024 if scheme is not None else 1
        # Longer groups have a wider range, by about the root of the logarithm of their length.
        loss = 0.0 if scheme is None else weights * 4.0**-scheme.bits * np.log2(group)
        found.append((size, loss, scheme))
    return found


def _capacities(
    spec: ModelSpec, base: Precision, cluster: Cluster, workload: Workload
) -> tuple[list[float], tuple[float, float]]:
    """What each device has for blocks, and what the embedding and the head take."""
    machine = _machine(spec, base, cluster, workload)
    devices = cluster.all_devices()
    costs = machine.item_costs(machine.group(devices[0], 1))
    whole = costs.weight_bytes + costs.kv_bytes
    room = [cluster.device_class(device.kind).usable_bytes - costs.activation_bytes for device in devices]
    return room, (float(whole[0] - whole[1]) if len(spec.blocks) > 1 else 0.0, float(whole[-1]))


def _machine(spec: ModelSpec, precision: Precision, cluster: Cluster, workload: Workload) -> Machine:
    costs = Costs(spec=spec, precision=precision, workload=workload, cut=cut(workload.batch, workload.batch))
    return Machine(cluster=cluster, costs=costs, degrees=[1])


def _tables(spec: ModelSpec) -> dict[str, Scheme]:
    found = assign(spec, parse_scheme("w8a16"))
    names = (spec.embedding.name, spec.head.name)
    return {name: scheme for name in names if (scheme := found[name].scheme) is not None}


def _named(spec: ModelSpec, base: Precision, choices: Sequence[Choice], counts: Sequence[int]) -> Precision:
    """The blocks in the middle get the fewest bits: the first and the last feel an error most."""
    order = sorted(range(len(spec.blocks)), key=lambda block: -abs(2 * block - len(spec.blocks) + 1))
    schemes = dict(base.schemes)
    for (_, _, scheme), many in zip(choices, counts, strict=True):
        mine, order = order[:many], order[many:]
        if scheme is not None:
            schemes |= {one.name: scheme for block in mine for one in spec.blocks[block].linears()}
    return Precision(dtype=base.dtype, schemes=schemes)
