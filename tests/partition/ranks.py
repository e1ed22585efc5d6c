"""The ranks of a layout as threads of one process, with queues for wires: what they compute, without starting any."""

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import torch

from llmopt.partition.runtime.layout import Layout, StageLayout
from llmopt.partition.runtime.schedule import Pipeline
from llmopt.partition.runtime.stage import DecoderStage
from llmopt.partition.runtime.trace import Trace

PATIENCE_S = 20


def layout_of(*stages):
    """Stages by (blocks, degree)."""
    found, first = [], 0
    for blocks, degree in stages:
        found.append(StageLayout(first=first, stop=first + blocks, degree=degree))
        first += blocks
    return Layout(tuple(found))


class Post:
    """What is between the ranks: a queue for each pair of them, and a place to meet for each stage."""

    def __init__(self, layout):
        self.queues = defaultdict(Queue)
        self.shared = [[None] * stage.degree for stage in layout.stages]
        self.meetings = [threading.Barrier(stage.degree, timeout=PATIENCE_S) for stage in layout.stages]


class ThreadWire:
    def __init__(self, layout, seat, post):
        self.stage, self.stages = seat.stage, len(layout.stages)
        self.layout, self.seat, self.post = layout, seat, post

    def send(self, values, stage):
        for rank in self.layout.receivers(self.seat, stage):
            self.post.queues[self.seat.rank, rank].put(values.clone())

    def receive(self, shape, dtype, stage):
        values = self.post.queues[self.layout.sender(self.seat, stage), self.seat.rank].get(timeout=PATIENCE_S)
        assert (tuple(values.shape), values.dtype) == (tuple(shape), dtype)
        return values

    def add_up(self, values):
        return self.gather(values).sum(0)

    def gather(self, values):
        shared, meeting = self.post.shared[self.stage], self.post.meetings[self.stage]
        shared[self.seat.index] = values
        meeting.wait()
        found = torch.stack(shared)
        meeting.wait()
        return found

    def flush(self):
        pass


def generate_in_threads(spec, tensors, layout, ids_BT, *, output, cut):
    """(new tokens [B, T], their logits [B, T, V]) of all ranks together."""

    def build(seat, wire):
        weights = {piece.tensor.name: piece.read(tensors) for piece in DecoderStage.cuts(spec, layout, seat)}
        capacity = ids_BT.shape[1] + output
        return DecoderStage(spec, layout, seat, weights, wire, capacity=capacity, device=torch.device("cpu"))

    return generate_with(build, layout, ids_BT, output=output, cut=cut)


def generate_with(build, layout, ids_BT, *, output, cut):
    """The same of stages that `build(seat, wire)` makes."""
    post = Post(layout)

    def work(rank):
        seat = layout.seat(rank)
        wire = ThreadWire(layout, seat, post)
        stage = build(seat, wire)
        with torch.inference_mode():
            return Pipeline(stage, wire, Trace()).generate(ids_BT, output, cut, keep_logits=True)

    with ThreadPoolExecutor(layout.size) as pool:
        found = list(pool.map(work, range(layout.size)))
    tokens = [each.ids_BT for each in found if each.ids_BT is not None]
    assert all(torch.equal(each, tokens[0]) for each in tokens)
    return tokens[0], torch.cat([each.logits_BTV for each in found if each.logits_BTV is not None], -1)
