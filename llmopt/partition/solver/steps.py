"""Ways to take devices into use, one group after another, as a graph: a state is what is in use and where the last is.

In a given order, a state is the place behind the last device in use. In any order, it is what each node has in use and
which node is the last; nodes that are alike may change places, so only how many of them have what in use counts. Both
say all that times and memory depend on.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmopt.partition.problem import Slot

Counts = tuple[int, ...]  # devices in use of a node, by class


class Step(NamedTuple):
    """One group more: from a state to a state with a greater number. `option` says which group."""

    before: int
    after: int
    option: int
    near: bool  # in the node of the last stage
    taken: Counts | int  # what its node had in use before; in a given order, the place of its first device


class Option(NamedTuple):
    """A group that there may be: on which of the sites, of which of its classes, of how many devices."""

    site: int
    place: int
    degree: int


class Site(NamedTuple):
    """How many nodes are alike, and how many devices of each class one has."""

    nodes: int
    counts: Counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Steps:
    """The graph. State 0 is that nothing is in use; no step leads to a state of the same or a lower level."""

    levels: tuple[int, ...]  # of each state
    every: tuple[Step, ...]


def steps_in_order(slots: Sequence[Slot], nodes: Sequence[int], *, most_steps: int) -> Steps | None:
    """For one order of devices in these nodes: a state is the place behind the last that is in use. An option is the
    number of a kind. None where there are more steps than `most_steps`."""
    if len(slots) * sum(len(slot.options) for slot in slots) > 2 * most_steps:
        return None
    found = []
    for before in range(len(slots)):
        for place in range(before, len(slots)):
            near = before > 0 and nodes[before - 1] == nodes[place]
            found += [Step(before, place + degree, kind, near, place) for degree, kind in slots[place].options]
    return Steps(levels=tuple(range(len(slots) + 1)), every=tuple(sorted(found, key=lambda step: step.after)))


class _Use(NamedTuple):
    """The node of the last stage, and the others that are in use: each its site and what of it is."""

    last: tuple[int, Counts] | None
    others: tuple[tuple[int, Counts], ...]


def count_uses(sites: Sequence[Site]) -> int:
    """At most how many states there are, the last node aside."""
    return math.prod(
        math.comb(site.nodes + math.prod(count + 1 for count in site.counts) - 1, site.nodes) for site in sites
    )


def steps_in_any_order(
    sites: Sequence[Site], options: Sequence[Option], *, most_stages: int, most_steps: int
) -> Steps | None:
    """For any order of devices and nodes; None where there are more steps than `most_steps`."""
    if count_uses(sites) > most_steps:
        return None
    nothing = _Use(None, ())
    waiting: dict[int, dict[_Use, int]] = {0: {nothing: 0}}  # by devices in use: states, and their fewest stages
    numbers: dict[_Use, int] = {}
    levels: list[int] = []
    found: list[tuple[int, _Use, int, bool, Counts]] = []
    while waiting:
        total = min(waiting)
        for use, stages in waiting.pop(total).items():
            numbers[use] = len(numbers)
            levels.append(total)
            if stages == most_stages:
                continue  # every stage has an item
            for number, near, taken, after in _ways(use, sites, options):
                found.append((numbers[use], after, number, near, taken))
                level = waiting.setdefault(total + options[number].degree, {})
                level[after] = min(level.get(after, most_stages), stages + 1)
            if len(found) > most_steps:
                return None
    every = [Step(before, numbers[after], number, near, taken) for before, after, number, near, taken in found]
    return Steps(levels=tuple(levels), every=tuple(sorted(every, key=lambda step: step.after)))


def _ways(use: _Use, sites: Sequence[Site], options: Sequence[Option]) -> Iterator[tuple[int, bool, Counts, _Use]]:
    """Every group that can be next: its option, whether it is near, what its node had in use, and what then is."""
    begun = Counter(site for site, _ in (*use.others, *([use.last] if use.last else [])))
    fresh = [(number, (0,) * len(site.counts)) for number, site in enumerate(sites) if begun[number] < site.nodes]
    for number, option in enumerate(options):
        if use.last is not None and (after := _more(use.last, option, sites)) is not None:
            yield number, True, use.last[1], _Use(after, use.others)
        left = use.others if use.last is None else tuple(sorted((*use.others, use.last)))
        for node in {*use.others, *fresh}:
            if (after := _more(node, option, sites)) is None:
                continue
            others = list(left)
            if any(node[1]):
                others.remove(node)
            yield number, False, node[1], _Use(after, tuple(others))


def _more(node: tuple[int, Counts], option: Option, sites: Sequence[Site]) -> tuple[int, Counts] | None:
    """The node with a group more in use, or None if it has no room for it."""
    site, taken = node
    if site != option.site or taken[option.place] + option.degree > sites[site].counts[option.place]:
        return None
    return site, tuple(count + option.degree * (place == option.place) for place, count in enumerate(taken))
