"""The stories: whole, grammatical, true to themselves, and scored as they were drawn."""

import random
import re

import pytest

from llmopt.demo import vocabulary
from llmopt.demo.grammar import compose, score

STORIES = [compose(random.Random(seed)) for seed in range(300)]


def test_reading_a_story_gives_the_log_probability_that_writing_it_gave():
    for story in STORIES:
        assert score(story.text) == pytest.approx(story.log_probability, rel=1e-12)


def test_the_entropy_lies_where_a_model_has_something_to_learn_and_something_to_guess():
    words = sum(len(re.findall(r"[\w-]+|[.,\n]", story.text)) for story in STORIES)
    assert 1.2 < -sum(story.log_probability for story in STORIES) / words < 1.5


def test_a_story_is_one_line_of_some_length():
    for story in STORIES:
        assert story.text.count("\n") == 1
        assert story.text.endswith(".\n")
        assert 40 < len(re.findall(r"[\w-]+|[.,\n]", story.text)) < 250


@pytest.mark.parametrize(
    ("old", "new"),
    [(".\n", "."), ("in", "im"), (".\n", ". Then it ended.\n"), (". ", " . "), (" a ", " an "), (" an ", " a ")],
)
def test_a_changed_story_is_none_of_the_grammar(old, new):
    story = next(story for story in STORIES if old in story.text)
    with pytest.raises(ValueError, match=r"none of the options|would have written"):
        score(story.text.replace(old, new, 1))


def test_a_wrong_pronoun_or_sum_is_none_of_the_grammar():
    story = next(story for story in STORIES if ", making five." in story.text)
    with pytest.raises(ValueError, match="would have written"):
        score(story.text.replace(", making five.", ", making six.", 1))
    story = next(story for story in STORIES if ". Her sister " in story.text)
    with pytest.raises(ValueError, match="would have written"):
        score(story.text.replace(". Her sister", ". His sister", 1))


def test_the_end_counts_what_was_given_and_received():
    changes = 0
    for story in STORIES:
        count = _owned(story.text)
        for kind, number in re.findall(r"(keeping|making) (\w+)\.", story.text):
            new = vocabulary.NUMBERS.index(number) + 1
            assert new < count if kind == "keeping" else new > count
            count, changes = new, changes + 1
        assert re.search(rf"with \S+ the \w+ and {vocabulary.NUMBERS[count - 1]} [a-z ]+\. ", story.text)
    assert changes > 100


def test_the_end_names_the_hero_the_town_and_the_pet_of_the_beginning():
    for story in STORIES:
        first, _, third = story.text.split(". ")[:3]
        town, hero, adjective, trade = re.fullmatch(r"\w+ (\w+) \w+ (\w+) the (\S+) (\S+)", first).groups()
        pet = re.search(r" and (\S+ the \w+)$", third).group(1)
        assert re.search(rf"{hero} \w+ to {town} with {pet} and ", story.text)
        assert story.text.endswith(f" {hero} the {adjective} {trade}.\n")


def test_sisters_have_womens_names_and_brothers_mens():
    names = {"sister": set(), "brother": set(), "friend": set()}
    for story in STORIES:
        relation, name = re.search(r"\. (?:Her|His) (\w+) was (\w+) the", story.text).groups()
        names.setdefault(relation, set()).add(name)
    assert names["sister"] <= set(vocabulary.WOMEN.options)
    assert names["brother"] <= set(vocabulary.MEN.options)
    assert names["friend"] & set(vocabulary.WOMEN.options)
    assert names["friend"] & set(vocabulary.MEN.options)


def _owned(text: str) -> int:
    verbs = "|".join(vocabulary.OWNED.options)
    return vocabulary.NUMBERS.index(re.search(rf"\. S?[Hh]e (?:{verbs}) (\w+) ", text).group(1)) + 1
