"""Tokens to run an export and its reference on: a little text that the model can read, the same every time."""

from pathlib import Path

import numpy as np

from llmopt.engine.base import TokenIds
from llmopt.model.rotary import longest_sequence
from llmopt.model.spec import ModelSpec

WINDOWS = 2
WINDOW_TOKENS = 128


def verification_windows(spec: ModelSpec, folder: Path, seed: int) -> list[TokenIds]:
    """Windows of token ids, [tokens] each; as long as the model can read, if that is less than the usual length."""
    length = min(WINDOW_TOKENS, longest_sequence(spec))
    rng = np.random.default_rng(seed)
    return [rng.integers(0, spec.vocab_size, length) for _ in range(WINDOWS)]
