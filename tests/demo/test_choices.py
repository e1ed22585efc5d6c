"""Choices that can be read back, and the probability of what they make."""

import math
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from llmopt.demo.choices import Author, Choice, Pen, Reader, either, render, zipf


class Explorer(Pen):
    """Takes given options first and then the first one, and remembers where it could have turned elsewhere."""

    def __init__(self, given: tuple[str, ...]) -> None:
        super().__init__()
        self.taken: list[str] = []
        self.alternatives: list[tuple[str, ...]] = []
        self._given = given

    def _take(self, choice: Choice) -> str:
        number = len(self.taken)
        option = self._given[number] if number < len(self._given) else choice.options[0]
        if number >= len(self._given):
            self.alternatives += [(*self.taken, other) for other in choice.options[1:]]
        self.taken.append(option)
        return option


def everything(tell) -> Iterator[Explorer]:
    """All texts of a grammar that has finitely many."""
    ahead: list[tuple[str, ...]] = [()]
    while ahead:
        explorer = Explorer(ahead.pop())
        tell(explorer)
        ahead += explorer.alternatives
        yield explorer


def tale(pen: Pen) -> None:
    who = pen.choose(zipf(["Ann", "Bo", "an old man"]))
    while pen.choose(zipf([".", "and", "but Bo sat ."])) == "and" and len(pen.words) < 9:
        pen.choose(zipf(["ran", "sat"]))
    pen.write(f"so {who} slept .")


def test_an_option_that_begins_another_is_refused():
    with pytest.raises(ValueError, match="'and' begins 'and then'"):
        zipf(["and then", "or", "and"])


def test_capitals_do_not_tell_options_apart():
    with pytest.raises(ValueError, match="'rose' begins 'rose'"):
        zipf(["Rose", "rose"])


def test_an_option_without_words_is_refused():
    with pytest.raises(ValueError, match="without words"):
        zipf(["and", " "])


def test_options_come_as_often_as_their_weights_say():
    choice = Choice(("a", "b", "c"), (1.0, 2.0, 5.0))
    source = random.Random(0)
    counts = Counter(choice.draw(source) for _ in range(8000))
    for option, log_probability in choice.log_probabilities.items():
        expected = 8000 * math.exp(log_probability)
        assert abs(counts[option] - expected) < 4 * math.sqrt(expected)


def test_either_gives_each_part_its_share():
    probabilities = {
        option: math.exp(value)
        for option, value in either((0.2, zipf("ab")), (0.6, zipf("cde"))).log_probabilities.items()
    }
    assert probabilities["a"] + probabilities["b"] == pytest.approx(0.25)
    assert probabilities["a"] / probabilities["b"] == pytest.approx(10 / 9)
    assert sum(probabilities.values()) == pytest.approx(1.0)


def test_without_leaves_the_other_options_in_proportion():
    left = Choice(("a", "b", "c"), (1.0, 2.0, 6.0)).without("b")
    assert left.log_probabilities == pytest.approx({"a": math.log(1 / 7), "c": math.log(6 / 7)})


def test_prose_has_capitals_behind_full_stops_and_no_space_before_punctuation():
    words = ["then", ",", "she", "slept", ".", "he", "did", "not", "."]
    assert render(words) == "Then, she slept. He did not."


def test_the_probabilities_of_all_texts_sum_to_one():
    assert math.fsum(math.exp(pen.log_probability) for pen in everything(tale)) == pytest.approx(1.0, abs=1e-12)


def test_no_two_series_of_choices_make_the_same_text():
    texts = [render(pen.words) for pen in everything(tale)]
    assert len(texts) > 30
    assert len(set(texts)) == len(texts)


def test_every_text_is_read_back_with_its_probability():
    for pen in everything(tale):
        reader = Reader(render(pen.words))
        tale(reader)
        assert reader.words == pen.words
        assert reader.log_probability == pytest.approx(pen.log_probability, abs=1e-12)


def test_a_text_that_no_choice_continues_is_refused():
    with pytest.raises(ValueError, match=r"word 1: none of the options continues with 'swam \."):
        tale(Reader("Ann swam."))


def test_an_author_repeats_itself_with_the_same_seed_only():
    def words(seed):
        author = Author(random.Random(seed))
        tale(author)
        return author.words

    assert words(3) == words(3)
    assert len({tuple(words(seed)) for seed in range(20)}) > 5
