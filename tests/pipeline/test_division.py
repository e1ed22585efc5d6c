"""What training takes is divided where it was asked for, or where memory leaves no other way, and it is said."""

from pathlib import Path

import pytest

from llmopt.pipeline.prepare import prepare
from llmopt.pipeline.qat import division
from llmopt.pipeline.qat.options import QatOptions
from llmopt.pipeline.request import QuantizeRequest
from llmopt.progress import Silent
from llmopt.quantize.scheme import parse_scheme

WIDE = 2**40


class Heard(Silent):
    """What was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def decide(tiny_llama, tmp_path, monkeypatch):
    def found(processes: int, available: int, **options: object) -> tuple[bool, list[str]]:
        request = QuantizeRequest(
            model=str(tiny_llama),
            output=Path(tmp_path / "out"),
            scheme=parse_scheme("w4a16"),
            method="rtn+qat",
            training=QatOptions(**options),  # type: ignore[arg-type]
        )
        prepared = prepare(request, Silent())
        monkeypatch.setattr(division, "place", lambda: (0, processes))
        monkeypatch.setattr(division, "processes_here", lambda: processes)
        monkeypatch.setattr(division, "available_bytes", lambda: available)
        heard = Heard()
        found = division.divides(prepared, heard)
        whole, shares = (prepared.needed(sharing=count).more_bytes for count in (1, processes))
        assert shares < whole or processes == 1
        return found, heard.said

    return found


def test_where_memory_has_room_for_all_of_it_every_process_holds_all(decide):
    assert decide(2, WIDE) == (False, [])


def test_where_it_has_room_for_shares_alone_it_is_divided_and_said(decide, tiny_llama, tmp_path):
    request = QuantizeRequest(
        model=str(tiny_llama), output=tmp_path / "x", scheme=parse_scheme("w4a16"), method="rtn+qat"
    )
    prepared = prepare(request, Silent())
    whole, shares = (prepared.needed(sharing=count).more_bytes for count in (1, 2))
    divided, said = decide(2, (whole + shares))
    assert divided
    assert "divided among 2 processes" in said[0]
    assert decide(2, 2 * shares - 1) == (False, [])  # nor for these: the run ends with what it needs
    assert decide(2, whole + shares, shard=False) == (False, [])
    assert decide(2, whole + shares, by_block=True) == (False, [])


def test_it_is_divided_where_that_was_asked_for(decide, monkeypatch):
    monkeypatch.setattr("llmopt.pipeline.request.place", lambda: (0, 2))
    divided, said = decide(2, WIDE, shard=True)
    assert divided
    assert len(said) == 1


def test_one_process_divides_nothing(decide):
    assert decide(1, 0) == (False, [])
