"""Text, as documents: what calibration learns from and what accuracy is measured on.

Documents are what a corpus is a sample of, so intervals are computed over them; where a file does not say where one
ends, it is one document.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

from llmopt import demo
from llmopt.errors import UsageError

# ` = Title = ` starts an article of WikiText, ` = = Title = = ` is a section of one.
_TITLE = re.compile(r"^ ?= (?!=).*(?<!=) = ?$", re.MULTILINE)
_SEPARATOR = re.compile(r"^(?:---|\f)[ \t]*(?:\n|\Z)", re.MULTILINE)
BUILT_IN = "built-in demo text"
BUILT_IN_CALIBRATION = "built-in demo text for calibration"
_FORMATS = 'a .txt file, or a .jsonl file of objects with the key "text"'

_LINE = 'each line is an object such as {"text": "Once upon a time"}'


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, at least one, none of them blank."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the documents, in order."""
        digest = hashlib.sha256()
        for document in self.documents:
            encoded = document.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.hexdigest()


def built_in(split: Literal["calibration", "evaluation"] = "evaluation", count: int = 400, seed: int = 0) -> Corpus:
    """The demo's stories, about 100 tokens each; what is calibrated on is never evaluated on."""
    name = BUILT_IN_CALIBRATION if split == "calibration" else BUILT_IN
    return Corpus(name, tuple(document.text for document in demo.documents(split, count, seed)))


def load_documents(path: Path) -> Corpus:
    """Read a text file.

    A `.jsonl` file has a document a line, under the key "text". A `.txt` file is cut before the titles of WikiText
    if it has two of them, else at lines of nothing but `---` or a form feed, else it is one document.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, has another format, or holds no text.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError("text of an unknown format", where=str(path), hint=f"give {_FORMATS}")
    text = _read(path)
    found = _lines_of_json(text, path) if path.suffix == ".jsonl" else cut(text)
    documents = tuple(document for document in found if document.strip())
    if not documents:
        raise UsageError("there is no text in it", where=str(path), hint=f"give {_FORMATS}")
    return Corpus(path.name, documents)


def is_title(line: str) -> bool:
    """Whether an article of WikiText begins with this line."""
    return _TITLE.fullmatch(line.removesuffix("\n")) is not None


def cut(text: str) -> list[str]:
    """Text of a file as its documents, blank ones among them: see `load_documents`."""
    titles = [match.start() for match in _TITLE.finditer(text)]
    if len(titles) < 2:
        return _SEPARATOR.split(text)
    # Blank lines before the first title belong to it; anything else there is a document without one.
    cuts = titles if text[: titles[0]].strip() else titles[1:]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def split(corpus: Corpus, calibration_fraction: float) -> tuple[Corpus, Corpus]:
    """A part to calibrate on, and the rest to evaluate on.

    The cut lies where a document ends, as close to the fraction of characters as that allows; a single document is
    cut where a line or, failing that, a word ends.

    Raises:
        UsageError: the fraction does not lie between 0 and 1, or there is too little text to divide.
    """
    if not 0.0 < calibration_fraction < 1.0:
        raise UsageError(f"the calibration fraction is {calibration_fraction}", hint="choose between 0 and 1")
    documents = corpus.documents
    if len(documents) == 1:
        documents = _halves(corpus, calibration_fraction)
    ends = list(accumulate(map(len, documents)))
    wanted = calibration_fraction * ends[-1]
    cut = 1 + min(range(len(ends) - 1), key=lambda index: abs(ends[index] - wanted))
    return (
        Corpus(f"{corpus.name}, calibration part", documents[:cut]),
        Corpus(f"{corpus.name}, evaluation part", documents[cut:]),
    )


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        what = f"the text cannot be read: {error.strerror}"
        raise UsageError(what, where=str(path), hint=f"check the path; give {_FORMATS}") from error
    if b"\0" in data:
        raise UsageError("this is no text: it holds zero bytes", where=str(path), hint=f"give {_FORMATS}, in UTF-8")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        hint = "convert it: iconv -f LATIN1 -t UTF-8"
        raise UsageError("the text is not UTF-8", where=f"{path}:{line}", hint=hint) from error


def _lines_of_json(text: str, path: Path) -> Iterator[str]:
    # Not str.splitlines: JSON strings may hold characters such as U+2028 that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _text_of(line, f"{path}:{number}")


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not valid JSON: {error}", where=where, hint=_LINE) from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise UsageError("not an object with a string under the key 'text'", where=where, hint=_LINE)
    return str(value["text"])


def _halves(corpus: Corpus, fraction: float) -> tuple[str, str]:
    text = corpus.documents[0]
    wanted = round(fraction * len(text))
    for end in ("\n", " "):
        cut = text.rfind(end, 0, wanted) + 1
        if text[:cut].strip() and text[cut:].strip():
            return text[:cut], text[cut:]
    raise UsageError("there is too little text to divide", where=corpus.name, hint="give more text")
