"""Time that is given is used, spread over the model, and not exceeded without a word."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from llmopt.pipeline.pace import NO_TIME_TO_FIT, NO_TIME_TO_LEARN, Pace, time_notes
from llmopt.report.results import LayerResult
from tests.families import CASES, spec_of


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Machine:
    """Quantizes blocks in so many seconds: what all need, GPTQ, learning; and a head that is as much as some blocks."""

    base: float = 2.0
    gptq: float = 4.0
    learning: float = 40.0
    head: float = 0.0
    clock: Clock = field(default_factory=Clock)

    def run(self, minutes: float | None, blocks: int = 30) -> tuple[Pace, list[bool], list[bool]]:
        """How it went, and which blocks, the head behind them, got GPTQ, and which learnt."""
        pace, fitted, learnt = Pace(minutes, self.clock), [], []
        for left in range(blocks, 0, -1):
            fitted.append(pace.begin(left + self.head))
            self.clock.now += 0.8 * self.base
            if fitted[-1]:
                self.fit(pace, self.gptq)
            learnt.append(fitted[-1] and pace.learns(left, self.head))
            if learnt[-1]:
                with pace.timed("reconstruct"):
                    self.clock.now += self.learning
            self.clock.now += 0.2 * self.base
        if self.head:
            fitted.append(pace.begin(self.head, self.head))
            self.clock.now += self.head * self.base
            if fitted[-1]:
                self.fit(pace, self.head * self.gptq)
        pace.finish()
        return pace, fitted, learnt

    def fit(self, pace: Pace, seconds: float) -> None:
        for _ in range(4):
            with pace.timed("search"):
                pass
            with pace.timed("gptq"):
                self.clock.now += seconds / 4


def test_without_a_limit_everything_is_done_and_no_clock_decides() -> None:
    _, fitted, learnt = Machine(learning=1e12).run(None)
    assert all(fitted)
    assert all(learnt)


@pytest.mark.parametrize("head", [0.0, 3.5])
@pytest.mark.parametrize("minutes", [1.25, 2, 3, 3.2, 4, 6, 10, 15, 20])
def test_what_is_given_is_not_exceeded_and_what_is_left_is_no_more_than_a_step(minutes: float, head: float) -> None:
    machine = Machine(head=head)
    pace, fitted, learnt = machine.run(minutes)
    left = 60 * minutes - pace.took_s
    assert left >= 0
    if not all(fitted):
        assert not any(learnt)
        assert left < 1.1 * machine.gptq * max(1, head) + 0.1 * 60 * minutes
    elif not all(learnt):
        assert left < 1.1 * machine.learning + 0.1 * 60 * minutes


def test_more_time_is_more_that_is_done() -> None:
    done = []
    for minutes in (1.2, 1.5, 2, 2.5, 3, 3.4, 4, 6, 9, 12, 18, 25):
        _, fitted, learnt = Machine().run(minutes)
        done.append((sum(fitted), sum(learnt)))
    assert done == sorted(done)
    assert done[0][0] < 15
    assert done[-1] == (30, 30)
    assert (30, 0) in done


@pytest.mark.parametrize("minutes", [6, 8, 10, 12])
def test_blocks_that_learn_are_spread_evenly(minutes: float) -> None:
    _, _, learnt = Machine().run(minutes)
    places = [index for index, one in enumerate(learnt) if one]
    gaps = [after - before for before, after in pairwise(places)]
    assert places[0] == 0
    assert max(gaps) <= min(gaps) + 2
    assert 30 - places[-1] <= max(gaps) + 1


def test_blocks_that_are_fitted_are_spread_evenly() -> None:
    _, fitted, _ = Machine().run(2)
    places = [index for index, one in enumerate(fitted) if one]
    assert max(after - before for before, after in pairwise(places)) <= 3


def test_the_first_block_does_not_learn_where_that_would_cost_others_gptq() -> None:
    """Before it was measured, learning counts as several times all else."""
    _, fitted, learnt = Machine().run(30 * 6 / 60 + 0.7)
    assert all(fitted)
    assert not learnt[0]


def test_learning_that_turns_out_quick_goes_to_more_blocks() -> None:
    _, _, learnt = Machine(learning=5).run(5)
    assert sum(learnt) > (5 * 60 - 30 * 6) / 40 * 2


def test_a_machine_that_slows_down_does_less() -> None:
    machine = Machine()
    pace = Pace(3.4, machine.clock)
    assert pace.begin(2)
    machine.fit(pace, 10)
    machine.clock.now += 180
    assert not pace.begin(1)


def spec():
    return spec_of(CASES["llama"])


def layers(*reasons: str | None) -> list[LayerResult]:
    """Those of blocks, with the reason of each block on its last layer."""
    found = []
    for block, reason in zip(spec().blocks, reasons, strict=True):
        *others, last = block.linears()
        found += [LayerResult(name=linear.name, scheme="w4a16", method="gptq") for linear in others]
        found.append(LayerResult(name=last.name, scheme="w4a16", method="gptq", reason=reason))
    return found


def test_notes_say_what_there_was_time_for() -> None:
    blocks, clock = spec().blocks, Clock()
    pace = Pace(5, clock)
    pace.finish()
    (note,) = time_notes(pace, blocks, layers(None, None, f"best; {NO_TIME_TO_LEARN}"))
    assert note.startswith("in 5 minutes there was time for gptq in 3 of 3 blocks, and for 2 to learn")
    (note,) = time_notes(pace, blocks, layers(f"best; {NO_TIME_TO_FIT}", f"best; {NO_TIME_TO_LEARN}", None))
    assert "gptq in 2 of 3 blocks, and for 1 to learn" in note
    clock.now += 360
    pace.finish()
    _, over = time_notes(pace, blocks, layers(None, None, None))
    assert over == "quantizing took 6.00 minutes, more than the 5 that were given"


def test_without_a_limit_there_is_nothing_to_note() -> None:
    assert time_notes(Pace(), spec().blocks, layers(None, None, None)) == []
