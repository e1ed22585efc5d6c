"""What is calibrated on, in the model's tokens, and whether that is enough."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmopt.calibrate.text import Corpus
from llmopt.calibrate.windows import windows
from llmopt.engine.base import TokenIds
from llmopt.errors import UsageError
from llmopt.model.rotary import longest_sequence
from llmopt.model.spec import ModelSpec
from llmopt.model.tokenizer import Tokenizer
from llmopt.pipeline.ranks import ALONE, Ranks

CALIBRATION_TOKENS = 64 * 512
WINDOW = 512
HELD_OUT = 8  # of so many windows the first is not fitted to, where something is to be judged
CONTEXT = 8  # tokens by which a token and those before it are told from others


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """What is calibrated on: at most `tokens` tokens of a text."""

    corpus: Corpus
    tokens: int

    def entry(self) -> dict[str, str | int]:
        """As manifests and reports name it."""
        return {"text": self.corpus.name, "sha256": self.corpus.sha256, "tokens": self.tokens, "window": WINDOW}

    def windows(self, spec: ModelSpec, tokenizer: Tokenizer) -> list[TokenIds]:
        """The text in the model's tokens."""
        found = windows(self.corpus, tokenizer, min(WINDOW, longest_sequence(spec)), self.tokens)
        # A tokenizer may know more tokens than the model has rows.
        return [np.minimum(ids, spec.vocab_size - 1) for ids in found.ids]


def is_held_out(place: int) -> bool:
    """Whether the window at some place among all is one that nothing is fitted to, where something is to be judged."""
    return place % HELD_OUT == 0


def require_tokens(
    spec: ModelSpec, windows: Sequence[TokenIds], ranks: Ranks = ALONE, *, holds_out: bool = False
) -> int:
    """See that there are as many tokens that are not just repeated as the widest linear has inputs, and a window for
    each process.

    Gives how many tokens there are, with those that are held out, which do not count for this.

    Raises:
        UsageError: there are fewer, which would leave its second moment singular, or a process without work.
    """
    if len(windows) < ranks.size:
        raise UsageError(
            f"{len(windows)} windows to calibrate on, and {ranks.size} processes to divide them among",
            hint="start fewer processes, or give more text with --calib-tokens or --calib",
        )
    fitted = [ids for index, ids in enumerate(windows) if not (holds_out and is_held_out(index))]
    tokens = sum(map(len, fitted))
    widest = max(spec.linears(), key=lambda linear: linear.in_features)
    if tokens < widest.in_features:
        raise UsageError(
            f"{tokens} tokens to calibrate on{', beside those held out' * holds_out}, and {widest.name} has "
            f"{widest.in_features} inputs",
            hint="give more text with --calib, or more of it with --calib-tokens",
        )
    different = different_tokens(fitted)
    if different < widest.in_features:
        raise UsageError(
            f"the text to calibrate on repeats itself: of its {tokens} tokens {different} differ, in themselves or in "
            f"the {CONTEXT - 1} before them, and {widest.name} has {widest.in_features} inputs",
            hint="give text like what the model will read with --calib",
        )
    return sum(map(len, windows))


def different_tokens(windows: Sequence[TokenIds]) -> int:
    """How many tokens differ, in themselves or in those before them: repeated ones put the same into a linear again."""
    contexts = [np.lib.stride_tricks.sliding_window_view(np.pad(ids, (CONTEXT - 1, 0)), CONTEXT) for ids in windows]
    return len(np.unique(np.concatenate(contexts), axis=0))
