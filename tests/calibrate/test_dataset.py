"""Text out of a dataset in a folder: which rows are read, and what is refused."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from llmopt.calibrate import dataset
from llmopt.calibrate.dataset_name import could_be_on_the_hub, parse_dataset_name
from llmopt.calibrate.load import TO_FIT, TO_MEASURE, load_text
from llmopt.calibrate.text import load_documents
from llmopt.errors import DataError, LlmoptError, UsageError
from llmopt.progress import Silent

WIKITEXT = " \n = Crab = \n \n A crab walks . \n = = Habitat = = \n \n The sea . \n \n = Eel = \n \n An eel swims . \n"


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def put(path: Path, rows: Sequence[object], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({column: rows, "id": list(range(len(rows)))}), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two configs; `plain` has three splits, its `train` two parts."""
    folder = tmp_path / "stories"
    put(folder / "plain/train-00001-of-00002.parquet", ["c", None])
    put(folder / "plain/train-00000-of-00002.parquet", ["a", " ", "b"])
    put(folder / "plain/test-00000-of-00001.parquet", ["d"])
    put(folder / "plain/validation-00000-of-00001.parquet", ["e"])
    (folder / "lines").mkdir()
    (folder / "lines/a.jsonl").write_text('{"text": "x", "more": "y"}\n\n{"text": null}\n{"text": "z"}\n')
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: plain\n  default: true\n  data_files:\n"
        "  - {split: train, path: plain/train-*}\n  - {split: test, path: plain/test-*}\n"
        "  - {split: validation, path: plain/validation-*}\n"
        "- config_name: lines\n  data_files: lines/*\n---\n"
    )
    return folder


def read(folder: Path, parts: str = "", preferred: Sequence[str] = TO_FIT) -> tuple[str, tuple[str, ...]]:
    corpus = load_text(f"{folder}{parts}", preferred, Silent())
    return corpus.name, corpus.documents


def test_what_is_not_named_is_the_default_config_and_the_split_for_the_purpose(folder: Path) -> None:
    assert read(folder) == ("stories:plain:train:text", ("a", "b", "c"))
    assert read(folder, preferred=TO_MEASURE) == ("stories:plain:test:text", ("d",))


def test_config_split_and_column_can_be_named(folder: Path) -> None:
    assert read(folder, "::validation") == ("stories:plain:validation:text", ("e",))
    assert read(folder, ":lines") == ("stories:lines:train:text", ("x", "z"))
    put(folder / "plain/test-00000-of-00001.parquet", ["f"], column="story")
    assert read(folder, ":plain:test:story") == ("stories:plain:test:story", ("f",))


def test_rows_that_are_the_lines_of_wikitext_give_the_documents_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "wiki.txt"
    file.write_text(WIKITEXT)
    rows = [line if line.strip() else "" for line in WIKITEXT.splitlines(keepends=True)]
    put(tmp_path / "wiki/train.parquet", rows)
    assert read(tmp_path / "wiki")[1] == load_documents(file).documents


def test_a_text_file_of_a_dataset_is_cut_as_one_is(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n---\nthree")
    assert read(tmp_path / "texts")[1] == ("one\ntwo\n", "three")


def test_compressed_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    with gzip.open(tmp_path / "packed/a.json.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": "é\u2028e"}, ensure_ascii=False))
    assert read(tmp_path / "packed")[1] == ("é\u2028e",)


def test_no_more_is_read_than_anything_uses_and_that_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MOST_CHARACTERS", 3)
    put(folder / "plain/train-00000-of-00002.parquet", ["ab", "cd", "ef"])
    (folder / "plain/train-00001-of-00002.parquet").unlink()  # never needed
    told = Told()
    assert load_text(str(folder), TO_FIT, told).documents == ("ab", "c")
    assert told.lines == [f"{folder}: its first 3 characters are read, and no more"]


def test_a_part_that_is_missing_is_missed(folder: Path) -> None:
    (folder / "plain/train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"plain/train-00001-of-00002\.parquet is not here"):
        read(folder)


@pytest.mark.parametrize(
    ("parts", "error", "what", "hint"),
    [
        (":plane", UsageError, "no config 'plane'", "did you mean 'plain'?"),
        ("::tset", UsageError, "no split 'tset'", "did you mean 'test'?"),
        (":::txt", UsageError, "no column 'txt'", "did you mean 'text'? known here: text"),
        (":::id", UsageError, "column 'id' does not hold text", "known here: text"),
        (":lines::txt", UsageError, "no column 'txt'", "did you mean 'text'? known here: text, more"),
        (":a:b:c:d", UsageError, "4 parts behind the dataset's name", "[:CONFIG[:SPLIT[:COLUMN]]]"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    folder: Path, parts: str, error: type[LlmoptError], what: str, hint: str
) -> None:
    with pytest.raises(error, match=what.replace("[", r"\[")) as caught:
        read(folder, parts)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.parquet", b"PAR1 no more", "a.parquet cannot be read"),
        ("a.json.gz", b"no gzip", "a.json.gz cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n[3]\n', "not a JSON object"),
        ("a.jsonl", b'{"text": "a', "not valid JSON"),
        ("a.jsonl", b'{"text": " "}\n', "there is no text in column 'text'"),
        ("a.txt", b"na\xefve", "a.txt cannot be read"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value.where)


def test_parquet_without_pyarrow_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="takes pyarrow") as caught:
        read(folder)
    assert caught.value.hint == "pip install 'llmopt[data]'"
    assert read(folder, ":lines")[1] == ("x", "z")


def test_a_name_is_taken_apart_and_put_together() -> None:
    name = parse_dataset_name("owner/name@refs/convert/parquet::test")
    assert (name.repository, name.revision, name.config, name.split) == (
        "owner/name",
        "refs/convert/parquet",
        None,
        "test",
    )
    assert name.exact("c0ffee") == "owner/name@c0ffee::test:"


@pytest.mark.parametrize("text", ["text", "./owner/name", "a/b/c", "C:\\texts", "owner/na me", "owner/name@", ""])
def test_what_is_no_name_is_refused(text: str) -> None:
    assert not could_be_on_the_hub(text)
    with pytest.raises(UsageError, match="neither a file or folder here nor the name of a dataset") as caught:
        load_text(text, TO_FIT, Silent())
    assert "Salesforce/wikitext" in str(caught.value.hint)


def test_a_file_that_is_missing_is_no_dataset() -> None:
    assert not could_be_on_the_hub("texts/mine.txt")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load_text("texts/mine.txt", TO_FIT, Silent())
