"""The embedded default: a tiny model trained by this project on stories of its own grammar. Works offline.

Training, calibration and evaluation text come from one grammar but different seeds, so evaluation text is held out.
The grammar knows the probability of every text that it makes, and so the best perplexity that any model can have.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llmopt.demo.grammar import Document, compose

__all__ = ["Document", "Split", "documents", "folder", "oracle_perplexity"]

Split = Literal["train", "calibration", "evaluation"]


def folder() -> Path:
    """Where the model lies, in Hugging Face's format."""
    return Path(__file__).parent / "model"


def documents(split: Split, count: int, seed: int = 0) -> list[Document]:
    """The first `count` stories of a split. The n-th is the same whatever the count."""
    # A string seeds by its SHA-512 hash, so that neighboring indices and other splits have unrelated streams.
    return [compose(random.Random(f"{split}/{seed}/{index}")) for index in range(count)]  # noqa: S311


def oracle_perplexity(documents: Sequence[Document], token_count: int) -> float:
    """The perplexity per token, of `documents` cut into `token_count` tokens, of a model that knows the grammar.

    No model can expect to do better: it is exp(-log P(text) / tokens) with the true probability of the text.
    """
    return math.exp(-math.fsum(document.log_probability for document in documents) / token_count)
