"""The best perplexity that any model could reach: known for the built-in text, because its grammar is."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmopt import demo
from llmopt.calibrate.windows import TokenWindows
from llmopt.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llmopt.pipeline.bench import BenchSettings


def oracle_note(windows: TokenWindows, settings: "BenchSettings", folder: Path) -> tuple[str, ...]:
    """A sentence with the perplexity of the true distribution in this model's tokens; nothing for other text."""
    if settings.text is not None:
        return ()
    read = sorted(set(np.concatenate(windows.cluster).tolist()))
    stories = demo.documents("evaluation", read[-1] + 1)
    documents = [stories[number] for number in read]
    tokenizer = Tokenizer.from_folder(folder)
    tokens = sum(len(tokenizer.encode(document.text)) for document in documents)
    best = demo.oracle_perplexity(documents, tokens)
    return (f"no model can have a perplexity below {best:.3f} on this text: that is its grammar's own",)
