"""The manifest, `llmopt.json`: what an artifact was made from, and the size and hash of every file in it.

It holds no dates and no absolute paths: two runs of one recipe write the same bytes. Like every contract it changes
only by additions, so a reader passes over keys that it does not know.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmopt.artifact.files import write_json
from llmopt.errors import ArtifactError

MANIFEST = "llmopt.json"
REPORT = "report.json"
MODEL_CARD = "README.md"
SCHEMA = "llmopt.artifact/1"

# Measuring an artifact writes its report, and the model card shows the report's numbers: neither is part of what the
# artifact computes.
_NOT_HASHED = frozenset({MANIFEST, REPORT, MODEL_CARD})
_OUTCOMES = frozenset({"files", "tuning"})  # of the work; all else in a manifest determines it
_AGAIN = "copy the artifact again, or make it again: --force replaces it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The model that an artifact was made from. `fingerprint` is the hash of what its tensors and config hold."""

    name: str
    revision: str | None = None
    fingerprint: str

    def __post_init__(self) -> None:
        assert not Path(self.name).is_absolute(), "a manifest names no place on one machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """Size and SHA-256 (hexadecimal) of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that determines an artifact, and what came of it.

    `files` maps a name relative to the folder, with forward slashes. `kernels` says how they were chosen, where the
    format leaves a choice, and `tuning` what was chosen.
    """

    source: Source
    format: str
    scheme: str | None = None
    budget: str | None = None
    method: str | None = None
    minutes: float | None = None
    calibration: Mapping[str, str | int] | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    seed: int = 0
    kernels: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    tuning: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Hash of everything that determines the artifact. Known before the work is done: equal keys, equal bytes."""
        causes = {name: value for name, value in dataclasses.asdict(self).items() if name not in _OUTCOMES}
        canonical = json.dumps(causes, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def differs(self, other: "Manifest") -> str:
        """What makes another artifact of it, in words: `scheme w8a8 and not w4a16`."""
        pairs = [(each.name, getattr(self, each.name), getattr(other, each.name)) for each in dataclasses.fields(self)]
        differing = [(name, mine, theirs) for name, mine, theirs in pairs if name not in _OUTCOMES and mine != theirs]
        simple = (str, int, type(None))
        return ", ".join(
            f"{name} {mine} and not {theirs}" if isinstance(mine, simple) and isinstance(theirs, simple) else name
            for name, mine, theirs in differing
        )

    def to_json(self) -> dict[str, Any]:
        """The object that `llmopt.json` holds."""
        return {"schema": SCHEMA, "key": self.key} | dataclasses.asdict(self)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash the files of `folder`, write its `llmopt.json`, and give the manifest with the files in it."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: _entry(folder / name) for name in names if name not in _NOT_HASHED}
    complete = dataclasses.replace(manifest, files=files)
    write_json(folder / MANIFEST, complete.to_json())
    return complete


def load_manifest(folder: Path, *, verify: bool = False) -> Manifest:
    """Read the manifest of the artifact in `folder`, and see that every file is there with its right size.

    Args:
        folder: the artifact.
        verify: read every file and compare its hash as well.

    Raises:
        ArtifactError: it is no artifact, is one of a later llmopt, or a file is missing or not what was written.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        _check_file(folder / name, entry, verify=verify)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the artifact in `folder` without looking at the files that it names.

    Raises:
        ArtifactError: it is no artifact, is one of a later llmopt, or names a file outside the folder.
    """
    path = folder / MANIFEST
    manifest = _parse(_read(folder), where=str(path))
    for name in manifest.files:
        _check_stays_inside(name, where=str(path))
    return manifest


def _read(folder: Path) -> bytes:
    if not folder.is_dir():
        raise ArtifactError("there is no such folder", where=str(folder))
    try:
        return (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ArtifactError(
            f"this is not an llmopt artifact: it has no {MANIFEST}",
            where=str(folder),
            hint="llmopt quantize MODEL -o OUT writes one",
        ) from None


def _parse(text: bytes, *, where: str) -> Manifest:
    try:
        content = json.loads(text)
    except ValueError as error:  # bad JSON, or not UTF-8
        raise ArtifactError(f"the manifest is not JSON: {error}", where=where) from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise _wrong_schema(schema, where=where)
    try:
        return TypeAdapter(Manifest).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"the manifest's {key!r} is wrong: {first['msg']}", where=where) from error


def _wrong_schema(schema: object, *, where: str) -> ArtifactError:
    if isinstance(schema, str) and schema.startswith("llmopt.artifact/"):
        return ArtifactError(
            f"the artifact has schema {schema}, and this llmopt reads {SCHEMA}", where=where, hint="upgrade llmopt"
        )
    return ArtifactError(f"this is not an artifact's manifest: its schema is {schema!r}", where=where)


def _check_stays_inside(name: str, *, where: str) -> None:
    # Windows rules as well: an artifact travels, and there `a\..\b` and `C:b` leave the folder.
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    leaves = posix.is_absolute() or windows.anchor or ".." in posix.parts or ".." in windows.parts
    if leaves or name in {"", "."}:
        raise ArtifactError(f"the manifest names a file outside its folder: {name!r}", where=where)


def _check_file(path: Path, entry: FileEntry, *, verify: bool) -> None:
    if not path.is_file():
        raise ArtifactError("a file of the artifact is missing", where=str(path), hint=_AGAIN)
    size_bytes = path.stat().st_size
    if size_bytes != entry.bytes:
        raise ArtifactError(
            f"a file of the artifact has {size_bytes:,} bytes and should have {entry.bytes:,}",
            where=str(path),
            hint=_AGAIN,
        )
    if verify and _sha256(path) != entry.sha256:
        what = "a file of the artifact is not what was written: its hash differs"
        raise ArtifactError(what, where=str(path), hint=_AGAIN)


def _entry(path: Path) -> FileEntry:
    return FileEntry(sha256=_sha256(path), bytes=path.stat().st_size)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
