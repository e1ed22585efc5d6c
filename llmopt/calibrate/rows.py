"""The texts that a dataset's file holds: a column of a Parquet file, a key of JSON lines, or a text file."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmopt.calibrate.layout import kind_of
from llmopt.errors import DataError, UsageError, near_match

TEXT = "text"
_LONGEST_LINE = 1 << 26  # characters; a file that is one line is no JSON lines


def read_rows(path: Path, column: str, where: str) -> Iterator[str]:
    """The texts of one file, in order, read little by little; rows without one are left out.

    Raises:
        UsageError: there is no such column of text.
        DataError: the file is damaged, or what reads it is not installed.
    """
    kind = kind_of(path.name)
    assert kind is not None, path
    try:
        yield from {"parquet": _parquet, "json": _json_lines, "text": _text}[kind](path, column, where)
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path.name} cannot be read: {error}", where=where, hint="it may be damaged") from error


def _parquet(path: Path, column: str, where: str) -> Iterator[str]:
    try:
        import pyarrow as pa  # noqa: PLC0415 (large, and needed for this only)
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        hint = "pip install 'llmopt[data]'"
        raise DataError(f"{path.name} is a Parquet file, which takes pyarrow", where=where, hint=hint) from error
    with parquet.ParquetFile(path) as file:
        fields = {field.name: field.type for field in file.schema_arrow}
        types = pa.types
        texts = [name for name, type_ in fields.items() if types.is_string(type_) or types.is_large_string(type_)]
        if column not in texts:
            raise _no_column(column, list(fields), texts, where)
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            yield from (value for value in batch.column(0).to_pylist() if value is not None)


def _json_lines(path: Path, column: str, where: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield from _text_of(line, column, f"{where}, {path.name}:{number}")


def _text_of(line: str, column: str, where: str) -> Sequence[str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "a .json file has an object a line"
        raise DataError(f"not valid JSON: {error}", where=where, hint=hint) from error
    if not isinstance(row, dict):
        raise DataError("not a JSON object", where=where, hint="a .json file has an object a line")
    value: Any = row.get(column)
    if column in row and value is None:
        return ()
    if not isinstance(value, str):
        raise _no_column(column, list(row), [name for name in row if isinstance(row[name], str)], where)
    return (value,)


def _text(path: Path, column: str, where: str) -> Iterator[str]:
    if column != TEXT:
        raise _no_column(column, [TEXT], [TEXT], where)
    yield from _lines(path)


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends; no more of one is read than could be text of any use."""
    # Not universal newlines, which would take a lone carriage return for the end of a line.
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        while line := file.readline(_LONGEST_LINE):
            yield line.replace("\r\n", "\n")


def _no_column(column: str, columns: Sequence[str], texts: Sequence[str], where: str) -> UsageError:
    what = f"column {column!r} does not hold text" if column in columns else f"the dataset has no column {column!r}"
    hint = f"name one, NAME:CONFIG:SPLIT:COLUMN; {near_match(column, texts)}" if texts else "it has no column of text"
    return UsageError(what, where=where, hint=hint)
