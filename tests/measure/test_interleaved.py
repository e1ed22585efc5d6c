"""Calls are timed in turns, and the least time of each counts."""

import pytest

from llmopt.measure.interleaved import FEWEST_ROUNDS, MOST_ROUNDS, TURN_S, fastest_ms


class Machine:
    """A clock, and calls that move it on by so many seconds each time they are made."""

    def __init__(self) -> None:
        self.now = 0.0
        self.made: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float):
        left = list(seconds)

        def made() -> None:
            self.made.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return made


def test_the_least_time_counts_whenever_it_was() -> None:
    machine = Machine()
    calls = [machine.call("a", 9.0, 3.0, 5.0), machine.call("b", 4.0, 6.0)]
    assert fastest_ms(calls, 100.0, machine.clock) == pytest.approx([3000, 4000])


def test_calls_take_turns() -> None:
    machine = Machine()
    fastest_ms([machine.call("a", 1.0), machine.call("b", 1.0)], 100.0, machine.clock)
    assert machine.made == ["a", "b"] * MOST_ROUNDS


def test_no_round_begins_once_the_budget_is_spent() -> None:
    machine = Machine()
    fastest_ms([machine.call("a", 1.0)], 2.5, machine.clock)
    assert len(machine.made) == 3
    slow = Machine()
    fastest_ms([slow.call("a", 50.0)], 2.5, slow.clock)
    assert len(slow.made) == FEWEST_ROUNDS


def test_short_calls_are_repeated_until_a_clock_can_tell_their_time() -> None:
    machine = Machine()
    (found,) = fastest_ms([machine.call("a", TURN_S / 8)], 100.0, machine.clock)
    assert found == pytest.approx(1e3 * TURN_S / 8)
    assert len(machine.made) == 1 + 8 * (MOST_ROUNDS - 1)
