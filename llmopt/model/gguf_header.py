"""The header of a GGUF file: its metadata, and where each tensor lies.

Read here rather than by the gguf package, whose reader turns every token of the vocabulary into several objects (three
seconds and 160 MB for 49 152 tokens), maps the file, and does not notice where a header runs out of its file.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFValueType

from llmopt.errors import ModelError, UnsupportedError
from llmopt.model.stored import StoredTensor, damaged, file_size, unreadable

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MOST_AXES = 4
_KINDS = {kind.value: kind for kind in GGML_QUANT_SIZES}
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata by key, without the arrays of strings (they are the vocabulary), and tensors by their GGUF names.

    Shapes are in the order of numpy, the reverse of the order in the file.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path) -> GgufHeader:
    """Everything in front of the weights.

    Raises:
        ModelError: this is not a GGUF file, or it is cut off or contradicts itself.
        UnsupportedError: it is one of a version, byte order or tensor type that is not known here, or a part of one.
    """
    size_bytes = file_size(path)
    try:
        with path.open("rb") as file:
            cursor = _Cursor(file, path, size_bytes)
            tensor_count, key_count = _read_preamble(cursor)
            metadata = dict(_read_metadata(cursor, key_count))
            infos = [_read_info(cursor) for _ in range(tensor_count)]
            data_start = _aligned(cursor, metadata)
    except OSError as error:
        raise unreadable(path, error) from error
    if metadata.get("split.count", 1) not in {0, 1}:
        hint = "join the parts: llama-gguf-split --merge FIRST_PART OUT.gguf"
        raise UnsupportedError("the file is one part of several", where=str(path), hint=hint)
    tensors = [_stored(info, path, data_start) for info in infos]
    _check_layout(tensors, size_bytes)
    return GgufHeader(metadata, {tensor.name: tensor for tensor in tensors})


@dataclass(slots=True)
class _Cursor:
    """Reads on, and never past the end of the file."""

    file: BinaryIO
    path: Path
    size_bytes: int

    def take(self, count: int) -> bytes:
        if count > self.size_bytes - self.file.tell():
            raise damaged("the file ends inside its header", self.path)
        return self.file.read(count)

    def scalars(self, dtype: str, count: int) -> list[Any]:
        values: list[Any] = np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype).tolist()
        return values

    def number(self, dtype: str) -> int:
        value: int = self.scalars(dtype, 1)[0]
        return value

    def text(self) -> str:
        raw = self.take(self.number("<u8"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise damaged(f"{raw[:40]!r} in its header is not UTF-8", self.path) from error


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Number of tensors and number of metadata keys."""
    if cursor.size_bytes < len(_MAGIC) or cursor.take(len(_MAGIC)) != _MAGIC:
        raise ModelError("this is not a GGUF file", where=str(cursor.path), hint="is it fully downloaded?")
    version = cursor.number("<u4")
    if version not in _VERSIONS:
        swapped = version & 0xFFFF == 0  # the number stands in the upper half when the bytes are the other way round
        what = "the file is big-endian" if swapped else f"GGUF version {version} is not supported"
        raise UnsupportedError(what, where=str(cursor.path), hint="convert the model again with a current llama.cpp")
    return cursor.number("<u8"), cursor.number("<u8")


def _read_metadata(cursor: _Cursor, count: int) -> Iterable[tuple[str, Any]]:
    seen: set[str] = set()
    for _ in range(count):
        key = cursor.text()
        if key in seen:
            raise damaged(f"{key} is there twice", cursor.path)
        seen.add(key)
        value = _read_value(cursor, cursor.number("<u4"))
        if value is not None:
            yield key, value


def _read_value(cursor: _Cursor, kind: int) -> Any:
    """A scalar, a text, a list of numbers, or None for a list of texts."""
    if kind == GGUFValueType.STRING:
        return cursor.text()
    if kind != GGUFValueType.ARRAY:
        return cursor.scalars(_scalar_dtype(cursor, kind), 1)[0]
    kind, count = cursor.number("<u4"), cursor.number("<u8")
    if kind != GGUFValueType.STRING:
        return cursor.scalars(_scalar_dtype(cursor, kind), count)
    for _ in range(count):
        cursor.take(cursor.number("<u8"))
    return None


def _scalar_dtype(cursor: _Cursor, kind: int) -> str:
    if kind not in _SCALARS:
        raise damaged(f"its header holds a value of unknown type {kind}", cursor.path)
    return _SCALARS[GGUFValueType(kind)]


def _read_info(cursor: _Cursor) -> _Info:
    name, axes = cursor.text(), cursor.number("<u4")
    if axes > _MOST_AXES:
        raise damaged(f"{name} has {axes} axes", cursor.path)
    shape = tuple(reversed(cursor.scalars("<u8", axes)))
    return _Info(name, shape, cursor.number("<u4"), cursor.number("<u8"))


def _aligned(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    """Where the tensors begin."""
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise damaged(f"general.alignment is {alignment!r}, where a power of two is needed", cursor.path)
    return math.ceil(cursor.file.tell() / alignment) * alignment


def _stored(info: _Info, path: Path, data_start: int) -> StoredTensor:
    kind = _KINDS.get(info.kind)
    if kind is None:
        hint = "use a file with a common type, such as Q8_0 or Q4_K_M"
        raise UnsupportedError(f"{info.name} has the unknown type {info.kind}", where=str(path), hint=hint)
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    if not info.shape or info.shape[-1] % block_values:
        raise damaged(f"{info.name} has shape {list(info.shape)}, which {kind.name} cannot have", path)
    size_bytes = math.prod(info.shape) // block_values * block_bytes
    return StoredTensor(
        info.name, info.shape, kind.name, file=path, offset=data_start + info.offset, size_bytes=size_bytes
    )


def _check_layout(tensors: Iterable[StoredTensor], size_bytes: int) -> None:
    """Tensors lie in the file and not on top of each other; between them there may be padding."""
    names: set[str] = set()
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.name in names:
            raise damaged(f"{tensor.name} is stored twice", tensor.file)
        if tensor.offset < end:
            raise damaged(f"{tensor.name} overlaps another tensor", tensor.file)
        end = tensor.offset + tensor.size_bytes
        if end > size_bytes:
            raise damaged(f"{tensor.name} ends at byte {end}, and the file has {size_bytes}", tensor.file)
        names.add(tensor.name)
