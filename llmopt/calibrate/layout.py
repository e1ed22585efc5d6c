"""Which files of a dataset hold which split of which config.

Read as the `datasets` library does: from the `configs` in the YAML header of the README, else from the files' names
(https://huggingface.co/docs/hub/datasets-manual-configuration and datasets-file-names-and-splits).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from llmopt.errors import DataError, UsageError, near_match

DEFAULT = "default"
# Kinds of files, by their suffixes; where a dataset has several and does not say which, the commonest is meant.
KINDS: Mapping[str, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "json": (".jsonl", ".json", ".jsonl.gz", ".json.gz"),
    "text": (".txt", ".txt.gz"),
}
_NO_DATA = ("dataset_infos.json", "dataset_info.json", "requirements.txt", "license.txt")
_WORDS = {"train": ("train", "training"), "validation": ("validation", "valid", "dev", "val")}
_WORDS["test"] = ("test", "testing", "eval", "evaluation")
_HEADER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.[\w.]+")
_WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_GLOB = re.compile(r"(\*\*/|\*\*|\*|\?|\[!?[^\]/]+\]|\{[^{}]*\})")
_CONVERTED = re.compile(r"([^/]+)/(?:partial-)?([^/]+)/\d{4}\.parquet")  # the branch refs/convert/parquet

Splits = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of each split of each config, in order; `default` is the config that is meant where none is named."""

    configs: Mapping[str, Splits]
    default: str | None

    def choose_config(self, name: str | None, where: str) -> str:
        """The config of that name, or the default one.

        Raises:
            UsageError: there is none of that name, or no default one.
        """
        if name is None and self.default is None:
            known = ", ".join(self.configs)
            raise UsageError("the dataset has several configs", where=where, hint=f"name one: NAME:CONFIG of {known}")
        chosen = name or self.default
        assert chosen is not None
        if chosen not in self.configs:
            hint = near_match(chosen, self.configs)
            raise UsageError(f"the dataset has no config {chosen!r}", where=where, hint=hint)
        return chosen

    def choose_split(self, config: str, name: str | None, preferred: Sequence[str], where: str) -> str:
        """The split of that name, else the first of the preferred ones that is there, else the only one.

        Raises:
            UsageError: there is none.
        """
        splits = self.configs[config]
        if name is not None and name not in splits:
            raise UsageError(f"config {config} has no split {name!r}", where=where, hint=near_match(name, splits))
        likely = [name] if name is not None else [*(split for split in preferred if split in splits)]
        if not likely and len(splits) > 1:
            hint = f"name one: NAME:{config}:SPLIT of {', '.join(splits)}"
            raise UsageError(f"config {config} has several splits", where=where, hint=hint)
        return (likely or list(splits))[0]


def read_layout(files: Iterable[str], readme: str, where: str) -> Layout:
    """Find configs and splits among the names of a dataset's files.

    Raises:
        DataError: no file can be read, or the header of the README means nothing.
    """
    data = sorted(file for file in files if kind_of(file) and PurePosixPath(file).name.lower() not in _NO_DATA)
    stated = _stated(readme, where)
    configs = {name: _files_of(entry, data, where) for name, entry in stated.items()} if stated else _converted(data)
    configs = {name: splits for name, splits in (configs or {DEFAULT: _inferred(data)}).items() if splits}
    if not configs:
        kinds = ", ".join(suffix for suffixes in KINDS.values() for suffix in suffixes)
        hint = f"read are {kinds}; the Hub has most datasets as .parquet under NAME@refs/convert/parquet"
        raise DataError("the dataset has no files that can be read", where=where, hint=hint)
    marked = [name for name, entry in stated.items() if entry.get("default") is True]
    default = next((name for name in [*marked, DEFAULT] if name in configs), None)
    return Layout(configs, next(iter(configs)) if len(configs) == 1 else default)


def kind_of(file: str) -> str | None:
    """How a file is read; None if it is not."""
    return next((kind for kind, suffixes in KINDS.items() if file.lower().endswith(suffixes)), None)


def _stated(readme: str, where: str) -> dict[str, dict[str, Any]]:
    """What the README says of each config, by its name."""
    header = _HEADER.match(readme.removeprefix("\ufeff"))
    try:
        content = yaml.safe_load(header[1]) if header else None
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"the header of README.md is not valid YAML: {error}", where=where) from error
    entries = content.get("configs") if isinstance(content, dict) else None
    if entries is None:
        return {}
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _meaningless(entries, where)
    # An entry that names no files describes a dataset that code of its own makes.
    kept = [entry for entry in entries if "data_files" in entry or "data_dir" in entry]
    return {str(entry.get("config_name", DEFAULT)): entry for entry in kept}


def _files_of(entry: Mapping[str, Any], data: Sequence[str], where: str) -> Splits:
    folder = str(entry.get("data_dir") or "").strip("/")
    inside = f"{folder}/" if folder else ""
    if entry.get("data_files") is None:
        return _inferred([file for file in data if file.startswith(inside)])
    splits: dict[str, list[str]] = {}
    for split, patterns in _patterns(entry["data_files"], where):
        for pattern in patterns:
            wanted = _as_regex(inside + pattern.removeprefix("./"), where)
            splits.setdefault(split, []).extend(file for file in data if wanted.fullmatch(file))
    return {split: tuple(dict.fromkeys(found)) for split, found in splits.items() if found}


def _patterns(stated: Any, where: str) -> list[tuple[str, list[str]]]:
    """Splits with the patterns of their files, from any of the forms that `data_files` has."""
    if isinstance(stated, dict):
        pairs = list(stated.items())
    elif isinstance(stated, list) and stated and all(isinstance(item, dict) for item in stated):
        pairs = [(item.get("split", "train"), item.get("path")) for item in stated]
    else:
        pairs = [("train", stated)]
    found = [(str(split), [paths] if isinstance(paths, str) else paths) for split, paths in pairs]
    for _, paths in found:
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise _meaningless(stated, where)
    return found


def _meaningless(stated: object, where: str) -> DataError:
    return DataError(f"the configs in README.md name no files: {str(stated)[:200]}", where=where)


def _as_regex(pattern: str, where: str) -> re.Pattern[str]:
    """A pattern of files: `*`, `?` and classes stay within a folder, `**` does not; `{a,b}` is one or the other."""
    try:
        return re.compile("".join(map(_meaning, _GLOB.split(pattern))))
    except re.error as error:
        raise _meaningless(pattern, where) from error


def _meaning(part: str) -> str:
    if part in _WILDCARDS:
        return _WILDCARDS[part]
    if not _GLOB.fullmatch(part):
        return re.escape(part)
    inside = part[1:-1]
    if part[0] == "{":
        return f"(?:{'|'.join(''.join(map(_meaning, _GLOB.split(option))) for option in inside.split(','))})"
    letters = inside.removeprefix("!").replace("\\", "\\\\").replace("[", r"\[")
    return f"(?!/)[{'^' if inside[0] == '!' else ''}{letters}]"


def _converted(data: Sequence[str]) -> dict[str, Splits]:
    """Configs by folder, as the Hub's own conversion lays them out; none if it is not that."""
    places = [_CONVERTED.fullmatch(file) for file in data]
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for file, place in zip(data, places, strict=True):
        if place is None:
            return {}
        splits = found.setdefault(place[1], {})
        splits[place[2]] = (*splits.get(place[2], ()), file)
    return dict(found)


def _inferred(data: Sequence[str]) -> Splits:
    kinds = [kind_of(file) for file in data]
    files = [file for file, kind in zip(data, kinds, strict=True) if kind == max(KINDS, key=kinds.count)]
    sharded = {file: _SHARD.fullmatch(PurePosixPath(file).name) for file in files}
    names = {file: match[1] for file, match in sharded.items() if match is not None}
    if len(names) < len(files):
        names = {file: split for file in files if (split := _split_in(file)) is not None}
    found: dict[str, tuple[str, ...]] = {}
    for file, split in (names or dict.fromkeys(files, "train")).items():
        found[split] = (*found.get(split, ()), file)
    return found


def _split_in(file: str) -> str | None:
    """The split that a file's name speaks of, or else the innermost folder that speaks of one."""
    for part in reversed(PurePosixPath(file).parts):
        words = re.split(r"[^a-z]+", part.lower())
        for split, known in _WORDS.items():
            if any(word in known for word in words):
                return split
    return None
