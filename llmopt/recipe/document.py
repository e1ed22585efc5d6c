"""YAML with the place of every key and value kept, so that an error can point at it.

Scalars are those of YAML 1.2, which editors check recipes against: `no` is a word and 010 is ten. Anchors and merge
keys work; tags that make objects, duplicate keys and keys that are not text are refused.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from llmopt.errors import RecipeError
from llmopt.words import counted

Keys = tuple[str | int, ...]

# Aliases of aliases can make a small file stand for a huge document.
_MOST_VALUES = 10_000
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_TRUTH = {"true": True, "false": False}
_SCALARS: Mapping[str, Callable[[str], Any]] = {
    f"{_TAG}null": lambda text: None,
    f"{_TAG}bool": lambda text: _TRUTH[text.lower()],
    f"{_TAG}int": int,
    f"{_TAG}float": float,
    f"{_TAG}str": str,
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own, those of YAML 1.1, are what this does without


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]{1,18}", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern})$"), _first)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where something was written. `folder` is what relative paths that were written there count from."""

    line: int
    column: int
    label: str
    folder: Path

    def __str__(self) -> str:
        return self.label


@dataclass(slots=True)
class Document:
    """Plain values (dict, list, str, int, float, bool, None), and the place of each key and value."""

    value: Any
    keys: dict[Keys, Place] = field(default_factory=dict)
    values: dict[Keys, Place] = field(default_factory=dict)

    def place(self, keys: Keys) -> Place:
        """Where the value under `keys` was written, or what holds it where there is no such value."""
        return next(self.values[keys[:size]] for size in range(len(keys), -1, -1) if keys[:size] in self.values)

    def key_place(self, keys: Keys) -> Place:
        """Where the last of `keys` itself was written."""
        return self.keys.get(keys) or self.place(keys)

    def assign(self, assignment: str) -> None:
        """Apply `key.path=value`, the value being YAML, as `--set` has it. List entries are counted from 0.

        Raises:
            RecipeError: it cannot be read, or leads through something that has no such entry.
        """
        place = Place(0, 0, f"--set {assignment}", Path())
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise RecipeError("a setting is KEY=VALUE", where=place.label, hint="--set steps.0.quantize.scheme=w8a16")
        keys = self._resolve(path.split("."), place)
        given = parse(text, label=place.label, folder=place.folder)
        _put(self.value, keys, given.value)
        self._forget(keys)
        self.keys[keys] = self.values[keys] = place

    def _resolve(self, parts: list[str], place: Place) -> Keys:
        """Turn the parts of a dotted path into keys, and make the mappings on the way that do not exist yet."""
        keys: Keys = ()
        value = self.value
        for part in parts[:-1]:
            keys = (*keys, _entry(value, part, keys, place))
            if value[keys[-1]] is None:
                value[keys[-1]] = {}
                self.keys[keys] = self.values[keys] = place
            value = value[keys[-1]]
        return (*keys, _entry(value, parts[-1], keys, place))

    def _forget(self, keys: Keys) -> None:
        for places in (self.keys, self.values):
            for below in [known for known in places if known[: len(keys)] == keys]:
                del places[below]


def parse(text: str, *, label: str, folder: Path) -> Document:
    """Read YAML. `label` names it in errors; relative paths in it count from `folder`.

    Raises:
        RecipeError: it is not YAML, or holds what a recipe cannot.
    """
    reader = _Reader(label, folder)
    try:
        node = yaml.compose(text, Loader=_Loader)
        return reader.document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "indent with spaces" if "'\\t'" in str(error.problem) else None
        where = f"{label}:{mark.line + 1}:{mark.column + 1}" if mark else label
        raise RecipeError(f"this is not YAML: {error.problem}", where=where, hint=hint) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"this is not YAML: {error}", where=label) from error
    except RecursionError as error:
        raise RecipeError("this is nested too deeply", where=label) from error


def _entry(value: Any, part: str, keys: Keys, place: Place) -> str | int:
    """The key or index that `part` means in `value`; a key that is new to a mapping is added to it, as None."""
    if isinstance(value, dict):
        value.setdefault(part, None)
        return part
    name = ".".join(map(str, keys))
    if isinstance(value, list):
        if part.isdecimal() and int(part) < len(value):
            return int(part)
        entries = f"{counted(len(value), 'entry', 'entries')}, counted from 0"
        raise RecipeError(f"{name!r} has {entries}, and none is {part!r}", where=place.label)
    raise RecipeError(f"{name!r} is {value!r}, which has no entry {part!r}", where=place.label)


def _put(value: Any, keys: Keys, new: Any) -> None:
    for key in keys[:-1]:
        value = value[key]
    value[keys[-1]] = new


class _Reader:
    """Turns composed nodes into plain values and notes where each was."""

    def __init__(self, label: str, folder: Path) -> None:
        self._label = label
        self._folder = folder
        self._keys: dict[Keys, Place] = {}
        self._values: dict[Keys, Place] = {}

    def document(self, node: Node | None) -> Document:
        if node is None:
            return Document(None, values={(): Place(1, 1, self._label, self._folder)})
        return Document(self._value(node, ()), self._keys, self._values)

    def _value(self, node: Node, keys: Keys) -> Any:
        self._values[keys] = self._place(node)
        if len(self._values) > _MOST_VALUES:
            raise RecipeError(f"this holds more than {_MOST_VALUES:,} values", where=self._label)
        if isinstance(node, MappingNode) and node.tag == f"{_TAG}map":
            return {key: self._value(value, (*keys, key)) for key, value in self._entries(node, keys).items()}
        if isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
            return [self._value(item, (*keys, index)) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _scalar(self, node: Node) -> Any:
        if not isinstance(node, ScalarNode) or node.tag not in _SCALARS:
            raise RecipeError(f"the tag {node.tag!r} has no place in a recipe", where=str(self._place(node)))
        try:
            return _SCALARS[node.tag](node.value)
        except (ValueError, KeyError) as error:
            raise RecipeError(f"{node.value!r} is not what its tag says", where=str(self._place(node))) from error

    def _entries(self, node: MappingNode, keys: Keys) -> dict[str, Node]:
        """The entries of a mapping, those of its merge keys first, so that its own win."""
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                for source in self._merge_sources(value_node):
                    merged = self._entries(source, keys) | merged
                continue
            key = self._key(key_node)
            if key in own:
                raise RecipeError(f"the key {key!r} is here twice", where=str(self._place(key_node)))
            own[key] = value_node
            self._keys[*keys, key] = self._place(key_node)
        return merged | own

    def _merge_sources(self, node: Node) -> Iterator[MappingNode]:
        sources = node.value if isinstance(node, SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, MappingNode):
                raise RecipeError("<< merges mappings only", where=str(self._place(source)))
            yield source

    def _key(self, node: Node) -> str:
        if not isinstance(node, ScalarNode) or node.tag != f"{_TAG}str":
            raise RecipeError("a key must be text", where=str(self._place(node)), hint="put it in quotes")
        return str(node.value)

    def _place(self, node: Node) -> Place:
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        return Place(line, column, f"{self._label}:{line}:{column}", self._folder)
