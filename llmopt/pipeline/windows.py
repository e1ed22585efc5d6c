"""Tokens to run an export and its reference on: a little text that the model can read, the same every time."""

from pathlib import Path

import numpy as np

from llmopt.calibrate.text import built_in
from llmopt.calibrate.windows import windows
from llmopt.engine.base import TokenIds
from llmopt.model.rotary import longest_sequence
from llmopt.model.spec import ModelSpec
from llmopt.model.tokenizer import Tokenizer

COUNT = 2
LENGTH = 128


def verification_windows(spec: ModelSpec, folder: Path, seed: int) -> list[TokenIds]:
    """A few windows of the built-in text, [tokens] each, in the tokens of the model whose tokenizer is in `folder`."""
    length = min(LENGTH, longest_sequence(spec))
    found = windows(built_in(count=40, seed=seed), Tokenizer.from_folder(folder), length, COUNT * length)
    # A tokenizer may know more tokens than the model has rows.
    return [np.minimum(ids, spec.vocab_size - 1) for ids in found.ids[:COUNT]]
