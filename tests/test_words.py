import pytest

from llmopt.words import counted


@pytest.mark.parametrize(("count", "words"), [(0, "0 gates"), (1, "1 gate"), (2, "2 gates"), (2048, "2,048 gates")])
def test_one_is_singular_and_thousands_are_set_apart(count, words):
    assert counted(count, "gate") == words


def test_a_plural_that_takes_more_than_an_s_is_said():
    assert counted(2, "entry", "entries") == "2 entries"
