"""JSON objects from files that nobody here wrote."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmopt.errors import ModelError
from llmopt.model.stored import damaged, open_file


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ModelError: the file cannot be read, or holds anything else.
    """
    with open_file(path) as file:
        return parse_object(file.read(), path)


def parse_object(text: bytes, where: Path) -> dict[str, Any]:
    """A JSON object in which no key comes twice.

    Raises:
        ModelError: the text is anything else.
    """

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise damaged(f"{key!r} is there twice", where)
            result[key] = value
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise damaged(f"not valid JSON: {error}", where) from error
    if not isinstance(value, dict):
        raise ModelError("not a JSON object", where=str(where))
    return value
