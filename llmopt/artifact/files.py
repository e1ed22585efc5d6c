"""Files as artifacts need them: JSON whose bytes depend on its content alone, and a look at the disk before writing."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmopt.errors import ResourceError


def to_json_text(value: Mapping[str, Any]) -> str:
    """`value` as indented JSON, keys in their own order, a newline at the end.

    Raises:
        ValueError: a number is NaN or infinite, which JSON has no word for. What was not measured is None.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to `path`: a reader sees the old file or the new one, never half of it."""
    write_text(path, to_json_text(value))


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all, or to what it is a link to.

    A pipe or a device stays what it is, and gets the text as it comes.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8", newline="\n")
        return
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_free_disk(path: Path, needed_bytes: int) -> None:
    """Make sure that the disk under `path`, which need not exist yet, has room for `needed_bytes`.

    Raises:
        ResourceError: it has not.
    """
    path = path.absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ResourceError(
            f"the disk has no room: {_megabytes(needed_bytes)} needed, {_megabytes(free_bytes)} free",
            where=str(existing),
            hint="free some space, or write to another disk",
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
