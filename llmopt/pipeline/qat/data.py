"""Text as what is trained on: windows of one length, some of them held out, and which of them a step sees."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmopt.calibrate.text import Corpus
from llmopt.calibrate.windows import windows
from llmopt.errors import UsageError
from llmopt.model.rotary import longest_sequence
from llmopt.model.spec import ModelSpec
from llmopt.model.tokenizer import Tokenizer
from llmopt.pipeline.calibration_text import WINDOW

HELD_OUT_WINDOWS = 8  # at most, and an eighth of all
AT_ONCE = 2  # windows that go through the model together


@dataclass(frozen=True, slots=True)
class TrainingText:
    """Windows, [windows, tokens]: those that are learnt from, and those that say how well."""

    learnt_NT: Tensor
    held_out_NT: Tensor

    def held_out(self) -> Sequence[Tensor]:
        """What is held out, a few windows at a time."""
        return torch.split(self.held_out_NT, AT_ONCE)

    def batches(self, first: int, *, windows: int, ranks: int, seed: int) -> Iterator[list[Tensor]]:
        """The batches of each step from a number on: so many windows together, in parts, as many for each process.

        Every window comes once before any comes again, each time in another order.
        """
        parts = ranks * max(1, -(-windows // (ranks * AT_ONCE)))
        per_epoch = max(1, len(self.learnt_NT) // windows)
        epoch, skipped = divmod(first, per_epoch)
        while True:
            order = np.random.default_rng([seed, epoch]).permutation(len(self.learnt_NT))
            # A text of fewer windows than a step sees is seen more than once in it.
            order = np.resize(order, per_epoch * windows)
            for step in range(skipped, per_epoch):
                chosen = torch.from_numpy(order[step * windows : (step + 1) * windows])
                yield list(self.learnt_NT[chosen].tensor_split(parts))
            epoch, skipped = epoch + 1, 0


def training_text(corpus: Corpus, spec: ModelSpec, tokenizer: Tokenizer) -> TrainingText:
    """A text in the model's tokens.

    Raises:
        UsageError: it is shorter than two windows.
    """
    length = min(WINDOW, longest_sequence(spec))
    found = [ids for ids in windows(corpus, tokenizer, length).ids if len(ids) == length]
    if len(found) < 2:
        raise UsageError(
            f"the text to train on has fewer than two windows of {length} tokens",
            where=corpus.name,
            hint="give more text with --train-data",
        )
    # A tokenizer may know more tokens than the model has rows.
    ids_NT = torch.from_numpy(np.minimum(np.stack(found), spec.vocab_size - 1))
    count = min(HELD_OUT_WINDOWS, max(1, len(found) // 8))
    held_out = torch.zeros(len(found), dtype=torch.bool)
    held_out[[place * len(found) // count for place in range(count)]] = True
    return TrainingText(ids_NT[~held_out], ids_NT[held_out])


def require_divisible(batch: int, ranks: int) -> None:
    """See that all processes have as many windows of a step.

    Raises:
        UsageError: they have not.
    """
    parts = ranks * max(1, -(-batch // (ranks * AT_ONCE)))
    if batch % parts:
        raise UsageError(
            f"{batch} windows in a step do not divide among {ranks} processes, {AT_ONCE} at once",
            hint=f"--batch {AT_ONCE * ranks}, or a multiple of that",
        )
