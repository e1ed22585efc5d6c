"""How people name the text of a dataset: `NAME[@REVISION][:CONFIG[:SPLIT[:COLUMN]]]`; what is left empty is chosen.

NAME is `owner/name` on the Hugging Face Hub, or a folder that holds the same files.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from llmopt.errors import UsageError

SYNTAX = "OWNER/NAME[@REVISION][:CONFIG[:SPLIT[:COLUMN]]], such as Salesforce/wikitext:wikitext-2-raw-v1:train"
_ON_THE_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[^:@\s]+)?")
_FILES = (".txt", ".jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetName:
    """What was typed; None where nothing was."""

    repository: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    column: str | None = None

    def exact(self, revision: str | None) -> str:
        """The same with a revision: where no part is None, a name that means one text for ever."""
        at = "" if revision is None else f"@{revision}"
        return ":".join([f"{self.repository}{at}", *(part or "" for part in (self.config, self.split, self.column))])


def is_file_name(text: str) -> bool:
    """Whether that names a text file, be it there or not."""
    return Path(text).is_file() or text.endswith(_FILES)


def could_be_on_the_hub(text: str) -> bool:
    """Whether that has the form of a dataset's name on the Hub."""
    return not text.endswith(_FILES) and _ON_THE_HUB.fullmatch(text.partition(":")[0]) is not None


def parse_dataset_name(text: str) -> DatasetName:
    """Take a dataset's name apart.

    Raises:
        UsageError: it is neither a folder that is there nor of the form of a name on the Hub, or has too many parts.
    """
    repository, *parts = text.split(":")
    revision = None
    if not repository or not Path(repository).is_dir():
        if _ON_THE_HUB.fullmatch(repository) is None:
            what = "neither a file or folder here nor the name of a dataset"
            raise UsageError(what, where=text, hint=f"give a .txt or .jsonl file, or {SYNTAX}")
        repository, _, typed = repository.partition("@")
        revision = typed or None
    if len(parts) > 3:
        raise UsageError(f"{len(parts)} parts behind the dataset's name, and there are 3", where=text, hint=SYNTAX)
    config, split, column = (part or None for part in (*parts, "", "", "")[:3])
    return DatasetName(repository=repository, revision=revision, config=config, split=split, column=column)
