"""Every plan there is, one after another: slow, and obviously right."""

import itertools
import math
import random

import numpy as np

from llmopt.partition.problem import Kind, Objective, Slot


def case(seed, *, uniform=False):
    """A random small problem: kinds of groups by class and degree, and devices in nodes."""
    draw = random.Random(seed)
    items, classes = draw.randint(2, 6), draw.randint(1, 2)
    degrees = draw.choice([(1,), (1, 2), (1, 2), (1, 3)]) if not uniform else (1,)
    base, size = [draw.randint(1, 20) for _ in range(items)], [draw.randint(1, 10) for _ in range(items)]
    tied = draw.choice([0, min(size[-1], size[0])])
    kinds, options = [], {}
    for name in range(classes):
        speed, capacity = draw.choice([0.5, 1.0, 2.0, 3.0]), draw.randint(5, 40)
        for degree in degrees:
            times = [one / speed / degree + draw.choice([0.0, 0.5]) * (degree > 1) for one in base]
            alone = min(draw.choice([0.0, 0.25]), times[-1])
            memory = np.concatenate([[0.0], np.cumsum(size)]) / degree
            kind = Kind(
                time=np.concatenate([[0.0], np.cumsum(times)]),
                memory=memory,
                capacity=capacity,
                alone_s=alone,
                alone_bytes=tied / degree,
            )
            options.setdefault(name, []).append((degree, len(kinds)))
            kinds.append(kind)
    inside, between = draw.choice([0.0, 0.3]), draw.choice([0.3, 1.5, 6.0])
    inside = between if uniform else inside
    devices = [(draw.randrange(classes), node) for node in range(draw.randint(1, 2)) for _ in range(draw.randint(1, 3))]
    form, count = draw.choice(["fill", "rounds"]), draw.choice([1, 2, 3, 8])
    objective = Objective(form=form, micro_batches=count)
    return kinds, options, devices[:4], (inside, between), objective


def slots_of(devices, options, hops):
    """An order of (class, node) as slots: a group begins where enough devices of its class follow in its node."""
    slots, run = [], 0
    for place, (name, node) in enumerate(devices):
        run += place > 0 and devices[place - 1][1] != node
        fitting = [
            (degree, kind)
            for degree, kind in options[name]
            if devices[place : place + degree] == [(name, node)] * degree
        ]
        slots.append(Slot(options=tuple(fitting), run=run, inside_s=hops[0], between_s=hops[1]))
    return slots


def groupings(slots, place=0):
    """Every choice of groups in an order, with any devices left out."""
    if place >= len(slots):
        yield []
        return
    yield from groupings(slots, place + 1)
    for degree, kind in slots[place].options:
        for rest in groupings(slots, place + degree):
            yield [(place, kind), *rest]


def brute_force(kinds, slots, objective):
    """The least value over all groupings and all cuts."""
    items, best = kinds[0].items, math.inf
    for groups in groupings(slots):
        for inner in itertools.combinations(range(1, items), len(groups) - 1) if groups else ():
            ends = (0, *inner, items)
            best = min(best, worth(kinds, slots, objective, groups, ends))
    return best


def worth(kinds, slots, objective, groups, ends):
    seconds, before = [], None
    for (place, number), first, stop in zip(groups, ends, ends[1:], strict=False):
        kind, slot, alone = kinds[number], slots[place], len(groups) == 1
        needed = kind.memory[stop] - kind.memory[first] - alone * kind.alone_bytes
        if needed > kind.capacity + 1e-9:
            return math.inf
        hop = 0.0 if before is None else slot.inside_s if slot.run == before else slot.between_s
        seconds.append(kind.time[stop] - kind.time[first] + hop - alone * kind.alone_s)
        before = slot.run
    total, largest, count = sum(seconds), max(seconds), objective.micro_batches
    return total + (count - 1) * largest if objective.form == "fill" else max(total, count * largest)
