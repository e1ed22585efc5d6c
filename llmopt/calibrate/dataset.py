"""Text out of a dataset: as many of its files as it takes, and no more text than anything here reads."""

import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path

from llmopt.calibrate.dataset_name import DatasetName
from llmopt.calibrate.layout import kind_of, read_layout
from llmopt.calibrate.repository import README, Repository, open_repository
from llmopt.calibrate.rows import TEXT, read_rows
from llmopt.calibrate.text import Corpus, cut, is_title
from llmopt.errors import DataError
from llmopt.progress import Progress

MOST_CHARACTERS = 1 << 24  # some four million tokens
_NUMBERED = re.compile(r"(.*[-.])(\d{5})(-of-)(\d{5})(\..*)")
_BLANK_LINE = " \n"  # of WikiText's files, which its rows have as nothing at all


def load_dataset(name: DatasetName, preferred: Sequence[str], progress: Progress) -> Corpus:
    """Read one column of one split; each row is a document.

    Where no split is named, the first of the `preferred` ones that is there is read. Rows that are lines, as those of
    WikiText are and those of text files, are put together and cut as a text file is. Its first 16,777,216 characters
    are read. The corpus has the name that means just this text: the commit, config, split and column.

    Raises:
        UsageError: there is no such config, split or column, or none is named and several could be meant.
        DataError: the dataset is not there or closed, cannot be reached or read, or holds no text.
    """
    repository = open_repository(name.repository, name.revision, progress)
    where = name.repository
    layout = read_layout(repository.files, _readme(repository), where)
    config = layout.choose_config(name.config, where)
    split = layout.choose_split(config, name.split, preferred, where)
    files = layout.configs[config][split]
    chosen = replace(name, config=config, split=split, column=name.column or TEXT)
    exact = chosen.exact(repository.commit)
    assert chosen.column is not None
    rows = list(_first_rows(repository, files, chosen.column, where, progress))
    lines = kind_of(files[0]) == "text" or sum(map(is_title, rows)) > 1
    found = cut("".join(row or _BLANK_LINE for row in rows)) if lines else rows
    documents = tuple(document for document in found if document.strip())
    if not documents:
        raise DataError(f"there is no text in column {chosen.column!r}", where=exact, hint="name another column")
    if repository.commit is None:  # paths mean nothing elsewhere
        exact = replace(chosen, repository=Path(name.repository).resolve().name).exact(None)
    return Corpus(exact, documents)


def _readme(repository: Repository) -> str:
    if README not in repository.files:
        return ""
    return repository.fetch(README).read_text(encoding="utf-8", errors="replace")


def _all_parts(files: Set[str]) -> list[str]:
    """The files, and those that are missing between them by what their names say, in order."""
    found = set(files)
    for match in filter(None, map(_NUMBERED.fullmatch, files)):
        before, between, count, suffix = match[1], match[3], match[4], match[5]
        found |= {f"{before}{number:05}{between}{count}{suffix}" for number in range(int(count))}
    return sorted(found)


def _first_rows(
    repository: Repository, files: Sequence[str], column: str, where: str, progress: Progress
) -> Iterator[str]:
    left = MOST_CHARACTERS
    known = set(files)
    for file in _all_parts(known):
        if file not in known:  # as in a cache without the Hub
            hint = f"fetch it: hf download {where} {file} --repo-type dataset"
            raise DataError(f"{file} is not here, and other parts of its split are", where=where, hint=hint)
        for row in read_rows(repository.fetch(file), column, where):
            yield row[:left]
            left -= len(row)
            if left <= 0:
                progress.say(f"{where}: its first {MOST_CHARACTERS:,} characters are read, and no more")
                return
