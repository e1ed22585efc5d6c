"""What training takes is divided where it was asked for, or where memory leaves no other way, and it is said."""

from types import SimpleNamespace

import pytest

from llmopt.pipeline.estimate import Estimate
from llmopt.pipeline.qat import division
from llmopt.pipeline.qat.options import QatOptions
from llmopt.progress import Silent

MB = 10**6
WHOLE, SHARE = 900 * MB, 500 * MB  # what training takes in each of two processes


class Heard(Silent):
    """What was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def needed(sharing: int) -> Estimate:
    return Estimate(
        resident_bytes=50 * MB,
        held_bytes=0,
        steps={"training": WHOLE if sharing == 1 else SHARE},
        output_bytes=0,
        journal_bytes=0,
    )


@pytest.fixture
def decide(monkeypatch):
    def found(available: int, processes: int = 2, **options: object) -> tuple[bool, list[str]]:
        monkeypatch.setattr(division, "place", lambda: (0, processes))
        monkeypatch.setattr(division, "processes_here", lambda: processes)
        monkeypatch.setattr(division, "available_bytes", lambda: available)
        heard = Heard()
        prepared = SimpleNamespace(training=SimpleNamespace(options=QatOptions(**options)), needed=needed)
        return division.divides(prepared, heard), heard.said

    return found


def test_where_memory_has_room_for_all_of_it_every_process_holds_all(decide):
    assert decide(2 * WHOLE) == (False, [])


def test_where_it_has_room_for_shares_alone_it_is_divided_and_said(decide):
    divided, said = decide(2 * WHOLE - 1)
    assert divided
    assert said == [
        "what training takes is divided among 2 processes: each needs about 550 MB of memory, and 950 MB if it held all"
    ]
    assert decide(2 * SHARE)[0]


def test_where_it_has_no_room_for_shares_either_the_run_is_left_to_say_what_it_needs(decide):
    assert decide(2 * SHARE - 1) == (False, [])


def test_what_was_asked_for_counts_more_than_memory(decide):
    assert decide(2 * WHOLE, shard=True)[0]
    assert decide(2 * SHARE, shard=False) == (False, [])


def test_one_process_and_a_block_at_a_time_divide_nothing(decide):
    assert decide(0, processes=1) == (False, [])
    assert decide(2 * SHARE, by_block=True) == (False, [])
