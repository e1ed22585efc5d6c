"""The textbook's case: a language model of 12 LSTM layers of width 2048 on two devices, "twice as fast".

    llmopt probe -o cluster.yaml --ranks 2
    python recipes/lstm_two_devices.py cluster.yaml

Plans where to cut the model with what the probe measured, runs it in one process on one thread, then in two with
micro-batches, and says what was predicted and what came of it. Two things bound the gain: with m micro-batches each of
the two waits for one of them, so that 2 m / (m + 1) is the most; and both read their weights from the same memory.
An LSTM goes through its tokens one by one, so micro-batches are cut by tokens, and not by sequences: fewer sequences
would read each matrix for fewer products.
"""

import sys
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from llmopt.measure.host import usable_cores
from llmopt.model.recurrent import RecurrentSpec, recurrent_spec
from llmopt.partition.cluster import Cluster, load_cluster
from llmopt.partition.device import DeviceClass, Link
from llmopt.partition.problem import Kind, Objective, Slot
from llmopt.partition.runtime.layout import Layout, StageLayout
from llmopt.partition.runtime.schedule import WHOLE, MicroBatches
from llmopt.partition.solver.fixed import FixedOrder
from llmopt.partition.solver.joining import best
from llmopt.partition.work import Product, passing_s, product_s
from llmopt.pipeline.launching.job import Job
from llmopt.pipeline.launching.run import run_job

MODEL = "lstm:12x2048"
SEQUENCES, TOKENS, MICRO_BATCHES = 128, 24, 24
DTYPE = "float32"
FLOAT_BYTES = 4
GATE_PASSES = 6  # reads and writes of a value of the gates: two sums, the sigmoids, the cell
PATIENCE_S = 300


def item_seconds(spec: RecurrentSpec, device: DeviceClass, tokens: int, keeps: float) -> list[float]:
    """The embedding, every layer, and the head, for one micro-batch; `keeps` is what is left of the speed.

    What reads the inputs is one product for all tokens; what reads the layer's own outputs is one for each token.
    """

    def seconds(rows: int, many: int) -> float:
        size = rows * spec.width * FLOAT_BYTES
        one = Product(rows=rows, columns=spec.width, weight_bytes=size, tokens=many, value_bytes=FLOAT_BYTES)
        return product_s(one, device.speeds[DTYPE])

    gates = 4 * spec.width
    inputs_s, outputs_s = seconds(gates, SEQUENCES * tokens), tokens * seconds(gates, SEQUENCES)
    passing = SEQUENCES * tokens * gates * FLOAT_BYTES * GATE_PASSES
    between_s = passing_s(passing, device.passing_gb_per_s) + tokens * device.launch_s / 2
    head_s = seconds(spec.vocab_size, SEQUENCES) * tokens / TOKENS
    layer_s = (inputs_s + outputs_s + between_s) / keeps
    return [0.0, *[layer_s] * spec.layers, head_s / keeps]


def predicted_s(
    spec: RecurrentSpec, device: DeviceClass, link: Link, devices: int, cut: MicroBatches
) -> tuple[float, list[int]]:
    """Seconds of the best plan, and its cuts: the first item of each stage, and the number of items."""
    tokens = TOKENS // cut.tokens
    hop_s = link.seconds(SEQUENCES * tokens * spec.width * FLOAT_BYTES)
    seconds = item_seconds(spec, device, tokens, device.shared if devices > 1 else 1.0)
    sums = np.concatenate([[0.0], np.cumsum(seconds)])
    kind = Kind(time=sums, memory=np.zeros_like(sums), capacity=1.0)
    slots = [Slot(options=((1, 0),), run=0, inside_s=hop_s, between_s=hop_s)] * devices
    objective = Objective(form="fill", micro_batches=cut.tokens)
    order = FixedOrder(kinds=[kind], slots=slots)
    pieces = best(order, objective)
    assert pieces is not None
    stages = order.seconds(pieces)
    return objective.value(sum(stages), max(stages)), [*(piece.first for piece in pieces), len(seconds)]


def layout_of(items: list[int], layers: int) -> Layout:
    """Stages of layers, of stages of items, of which the first is the embedding and the last the head."""
    ends = [min(max(item - 1, 0), layers) for item in items]
    return Layout(tuple(StageLayout(first=first, stop=stop) for first, stop in pairwise(ends)))


def measured_s(layout: Layout, cut: MicroBatches) -> float:
    """Seconds of a pass over all tokens, the median of two, with one core for each process."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, recurrent_spec(MODEL).vocab_size, (SEQUENCES, TOKENS))
    ids_BT = tuple(tuple(int(token) for token in row) for row in rows)
    job = Job(model=MODEL, layout=layout, ids_BT=ids_BT, output=1, cut=cut, rounds=2, timeout_s=PATIENCE_S)
    return median(each.ended_s[0] for each in run_job(job, shares=usable_cores()).reports[0].rounds)


def speeds_of(cluster: Cluster) -> tuple[DeviceClass, Link]:
    """What the probe says of its first node."""
    node = cluster.nodes[0]
    assert node.link is not None, "probe with --ranks 2"
    return cluster.device_class(next(iter(node.devices))), node.link


def main() -> None:
    """Plan, run twice, compare."""
    spec = recurrent_spec(MODEL)
    device, link = speeds_of(load_cluster(Path(sys.argv[1])))
    found = {}
    for devices, cut in ((1, WHOLE), (2, MicroBatches(tokens=MICRO_BATCHES))):
        planned_s, items = predicted_s(spec, device, link, devices, cut)
        layout = layout_of(items, spec.layers)
        found[devices] = planned_s, measured_s(layout, cut)
        layers = " + ".join(str(stage.stop - stage.first) for stage in layout.stages)
        print(f"{devices} × one core, {layers} layers: {planned_s:.2f} s predicted, {found[devices][1]:.2f} s measured")
    planned, measured = (found[1][which] / found[2][which] for which in range(2))
    print(f"faster by {measured:.2f}, predicted {planned:.2f}")


if __name__ == "__main__":
    main()
