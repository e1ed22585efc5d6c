"""The probabilistic grammar of the demo: stories, each with the probability of its very text."""

import random
from dataclasses import dataclass

from llmopt.demo.choices import Author, Reader, render
from llmopt.demo.story import tell

END = "\n"


@dataclass(frozen=True, slots=True)
class Document:
    """A story, which ends with a line feed, and the natural logarithm of the probability that the grammar gives it."""

    text: str
    log_probability: float


def compose(random_source: random.Random) -> Document:
    """Draw a story."""
    author = Author(random_source)
    tell(author)
    return Document(render(author.words) + END, author.log_probability)


def score(text: str) -> float:
    """Log-probability, in nats, of a story (with its line feed) under the grammar.

    Raises:
        ValueError: the grammar cannot produce this text.
    """
    reader = Reader(text)
    tell(reader)
    if render(reader.words) + END != text:
        raise ValueError("the grammar would have written something else behind the same choices")
    return reader.log_probability
