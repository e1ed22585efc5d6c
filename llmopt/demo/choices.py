"""Random choices that can be read back from the text that they made.

A choice is made among short runs of words, none of which begins another, and whatever is chosen is written at once.
So the words behind any point of a text say which option was taken there: a text comes from one series of choices only,
and the sum of their log-probabilities is the log-probability of the text itself, not merely a bound of it.
"""

import math
import random
from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

PUNCTUATION = frozenset(".,")


@dataclass(frozen=True, eq=False)
class Choice:
    """Options (words and punctuation, separated by spaces) with weights that need not sum to one.

    Raises:
        ValueError: an option is empty or begins another one: the text would not say which was meant.
    """

    options: tuple[str, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        # In sorted order, whatever begins with an option stands right behind it.
        for first, second in pairwise(sorted(map(_words, self.options))):
            if second[: len(first)] == first:
                raise ValueError(f"{' '.join(first)!r} begins {' '.join(second)!r}")

    @cached_property
    def log_probabilities(self) -> dict[str, float]:
        """Natural logarithm of each option's probability."""
        total = math.fsum(self.weights)
        return {option: math.log(weight / total) for option, weight in zip(self.options, self.weights, strict=True)}

    @cached_property
    def _cumulative(self) -> list[float]:
        return list(accumulate(self.weights))

    def draw(self, random_source: random.Random) -> str:
        """One option, by its weight."""
        point = random_source.random() * self._cumulative[-1]
        return self.options[min(bisect(self._cumulative, point), len(self.options) - 1)]

    def map(self, change: Callable[[str], str]) -> "Choice":
        """The same choice in other words."""
        return Choice(tuple(map(change, self.options)), self.weights)

    def without(self, taken: str) -> "Choice":
        """The same choice when one option is not to be had."""
        left = [pair for pair in zip(self.options, self.weights, strict=True) if pair[0] != taken]
        return Choice(tuple(option for option, _ in left), tuple(weight for _, weight in left))


def zipf(options: Iterable[str]) -> Choice:
    """The n-th option weighs 1 / (n + 8): Zipf's law with Mandelbrot's flatter start, as words of one kind have it."""
    options = tuple(options)
    return Choice(options, tuple(1.0 / (rank + 8) for rank in range(1, len(options) + 1)))


def either(*parts: tuple[float, Choice]) -> Choice:
    """A choice among the options of several choices, each having the given share."""
    options: list[str] = []
    weights: list[float] = []
    for share, choice in parts:
        options += choice.options
        weights += [share * math.exp(choice.log_probabilities[option]) for option in choice.options]
    return Choice(tuple(options), tuple(weights))


class Pen(ABC):
    """Takes choices and fixed words alike; `log_probability` is that of everything written so far, in nats."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.log_probability = 0.0

    def write(self, text: str) -> None:
        """Words that follow from what has been written already."""
        self.words += text.split()

    def choose(self, choice: Choice) -> str:
        """Take one option, write it and return it."""
        option = self._take(choice)
        self.log_probability += choice.log_probabilities[option]
        self.write(option)
        return option

    @abstractmethod
    def _take(self, choice: Choice) -> str: ...


class Author(Pen):
    """Chooses at random."""

    def __init__(self, random_source: random.Random) -> None:
        super().__init__()
        self._random = random_source

    def _take(self, choice: Choice) -> str:
        return choice.draw(self._random)


class Reader(Pen):
    """Chooses what a given text says was chosen."""

    def __init__(self, text: str) -> None:
        super().__init__()
        separated = "".join(f" {letter} " if letter in PUNCTUATION else letter for letter in text)
        self._text = _words(separated)

    def _take(self, choice: Choice) -> str:
        ahead = self._text[len(self.words) :][:16]
        for option in choice.options:
            words = _words(option)
            if ahead[: len(words)] == words:
                return option
        raise ValueError(f"word {len(self.words)}: none of the options continues with {' '.join(ahead)!r}")


def _words(text: str) -> tuple[str, ...]:
    # The first word of a sentence is written with a capital, so capitals cannot tell options apart.
    words = tuple(text.casefold().split())
    if not words:
        raise ValueError("an option without words cannot be read back")
    return words


def render(words: Iterable[str]) -> str:
    """Words as prose: a space between them but not before punctuation, and a capital behind each full stop."""
    text, begins = "", True
    for word in words:
        text += (
            word if word in PUNCTUATION else (" " if text else "") + (word[0].upper() + word[1:] if begins else word)
        )
        begins = word == "."
    return text
