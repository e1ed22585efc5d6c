"""From what people type to documents: a text file, a dataset on the Hugging Face Hub, or one in a folder."""

from collections.abc import Sequence
from pathlib import Path

from llmopt.calibrate.dataset import load_dataset
from llmopt.calibrate.dataset_name import is_file_name, parse_dataset_name
from llmopt.calibrate.text import Corpus, load_documents
from llmopt.progress import Progress

TO_FIT = ("train",)
TO_MEASURE = ("test", "validation")


def load_text(text: str | Path, preferred: Sequence[str], progress: Progress) -> Corpus:
    """Read the text that is named; what is here wins over the Hub. `preferred` splits are read where none is named.

    Raises:
        UsageError: it is not there, has no form that is known, or lacks the config, split or column.
        DataError: a dataset cannot be fetched, or holds no text.
    """
    if is_file_name(str(text)):
        return load_documents(Path(text))
    return load_dataset(parse_dataset_name(str(text)), preferred, progress)
