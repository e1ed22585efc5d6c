"""Stages that somebody gives, priced."""

from collections.abc import Sequence

from llmopt.errors import UsageError
from llmopt.partition.candidate import Candidate
from llmopt.partition.cluster import Device
from llmopt.partition.obstacles import too_large
from llmopt.partition.problem import Piece
from llmopt.partition.settings import Settings
from llmopt.words import counted


def own_split(settings: Settings, devices: Sequence[Device], split: Sequence[int]) -> Candidate:
    """The plan with so many blocks for each stage.

    Raises:
        UsageError: there can be no such stages.
        BudgetError: a stage does not fit; with how many blocks would.
    """
    wanted, blocks = settings.wanted, len(settings.model.spec.blocks)
    degree = wanted.degree or 1
    if split[0] < 1 or min(split) < 0:
        raise UsageError("the first stage has a block, for it has the embedding", where="--split")
    if sum(split) != blocks:
        what = f"{'+'.join(map(str, split))} are {sum(split)} blocks, and the model has {blocks}"
        raise UsageError(what, where="--split", hint="their sum is the number of blocks")
    if len(split) * degree > len(devices):
        what = f"{counted(len(split), 'stage')} of {counted(degree, 'device')}, where there are {len(devices)}"
        raise UsageError(what, where="--split", hint="give fewer stages, or more devices")
    replicas = wanted.replicas or 1
    count = wanted.micro_batches or min(settings.sequences(replicas), len(split))
    machine = settings.machine(replicas, count, [degree])
    pieces = divided(split, degree)
    for piece in pieces:
        group = devices[piece.slot : piece.slot + degree]
        if len({(device.kind, device.node) for device in group}) > 1:
            what = f"{', '.join(device.name for device in group)} are not of one class and node"
            raise UsageError(what, where="--order", hint="a stage's devices are alike, and in one node")
    stages = machine.stages(devices, pieces)
    if not machine.fits(stages):
        raise too_large(machine, devices, stages)
    return Candidate(machine=machine, devices=tuple(devices), stages=stages, predicted=machine.predicted(stages))


def divided(split: Sequence[int], degree: int) -> list[Piece]:
    """So many blocks for each group; the embedding for the first, the head for the last."""
    pieces, first = [], 0
    for number, blocks in enumerate(split):
        stop = first + blocks + (number == len(split) - 1)
        pieces.append(Piece(number * degree, degree, 0, first, stop))
        first = stop
    return pieces
