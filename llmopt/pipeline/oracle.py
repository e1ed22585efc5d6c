"""The best perplexity that any model could reach: known for the built-in text, because its grammar is."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmopt import demo
from llmopt.calibrate.windows import TokenWindows
from llmopt.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llmopt.pipeline.bench import BenchSettings


def oracle_note(windows: TokenWindows, settings: "BenchSettings", folder: Path) -> tuple[str, ...]:
    """A sentence with the perplexity of the true distribution in this model's tokens; nothing for other text."""
    if settings.text is not None:
        return ()
    count = max(1, 1 + int(max(cluster.max() for cluster in windows.cluster)))
    documents = demo.documents("evaluation", count)
    tokenizer = Tokenizer.from_folder(folder)
    tokens = sum(len(tokenizer.encode(document.text)) for document in documents)
    best = demo.oracle_perplexity(documents, tokens)
    return (f"no model can have a perplexity below {best:.3f} on this text: that is its grammar's own",)
