import io
import time

import pytest
import rich.console

from llmopt.cli.progress import BarProgress, LineProgress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log():
    return io.StringIO()


@pytest.fixture
def progress(clock, log):
    return LineProgress(rich.console.Console(file=log), clock)


def work(progress, clock, steps, seconds_each, total):
    with progress.task("quantize", total=total) as task:
        for number in range(steps):
            clock.now += seconds_each
            task.advance(note=f"block {number}")


def test_brief_work_says_nothing(progress, clock, log):
    work(progress, clock, steps=10, seconds_each=0.1, total=10)
    assert log.getvalue() == ""


def test_a_line_tells_the_share_the_time_left_and_what_is_next(progress, clock, log):
    work(progress, clock, steps=4, seconds_each=15, total=4)
    assert log.getvalue().splitlines() == [
        "quantize: 25%, 45 s left (block 0)",
        "quantize: 50%, 30 s left (block 1)",
        "quantize: 75%, 15 s left (block 2)",
        "quantize: 100%, 0 s left (block 3)",
        "quantize: done in 1 min 0 s",
    ]


def test_many_small_steps_give_a_line_every_ten_seconds_at_most(progress, clock, log):
    work(progress, clock, steps=1000, seconds_each=1 / 16, total=1000)
    assert len(log.getvalue().splitlines()) == 60 / 10 + 1


def test_long_work_gives_a_line_every_ten_percent(progress, clock, log):
    work(progress, clock, steps=1000, seconds_each=0.5, total=1000)
    assert len(log.getvalue().splitlines()) == 10 + 1


def test_very_long_work_still_gives_a_line_every_minute(progress, clock, log):
    work(progress, clock, steps=120, seconds_each=10, total=10_000)
    assert len(log.getvalue().splitlines()) == 20 + 1


def test_work_of_unknown_size_counts(progress, clock, log):
    work(progress, clock, steps=61, seconds_each=1, total=None)
    assert log.getvalue().splitlines() == ["quantize: 60 done in 1 min 0 s (block 59)", "quantize: done in 1 min 1 s"]


def test_work_that_fails_is_not_called_done(progress, clock, log):
    def fail():
        with progress.task("quantize", total=1):
            clock.now += 3600
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - it is our own
        fail()
    assert log.getvalue() == ""


def test_remarks_are_printed_as_they_are(progress, log):
    progress.say("[red] is no markup, and a line is " + "never folded " * 20)
    assert log.getvalue() == "[red] is no markup, and a line is " + "never folded " * 20 + "\n"


def test_a_terminal_shows_bars_and_takes_them_away():
    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=100)
    progress = BarProgress(console)
    with progress.task("outer", total=2) as outer, progress.task("inner [red]", total=4) as inner:
        outer.advance()
        inner.advance(2, note="block 2")
        progress.say("[red] is no markup")
        time.sleep(0.6)  # bars are drawn twice a second
    with progress.task("again"):
        pass
    shown = screen.getvalue()
    for expected in ("outer", "inner [red]", "50%", "block 2", "[red] is no markup", "again"):
        assert expected in shown
    assert "\x1b[?25h" in shown.rpartition("\x1b[?25l")[2]  # the cursor is visible again
