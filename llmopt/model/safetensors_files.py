"""The safetensors files of a folder: which they are, and where each tensor lies in them.

The headers are read here rather than by the safetensors package, for two reasons: an error should name the tensor that
is cut off, not only the file, and weights are read as plain byte ranges, since mapped pages count as resident memory.
Layout: eight bytes with the size of the header, the header in JSON, then the tensors without gaps.
https://huggingface.co/docs/safetensors/index#format
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmopt.errors import ModelError
from llmopt.model.json_file import parse_object, read_object
from llmopt.model.stored import StoredTensor, damaged, file_size, open_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_SIZE_BYTES = 8
_LARGEST_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
_DTYPES_BY_BYTES = {
    1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"),
    2: ("F16", "BF16", "I16", "U16"),
    4: ("F32", "I32", "U32"),
    8: ("F64", "I64", "U64"),
}
_BYTES = {dtype: size for size, dtypes in _DTYPES_BY_BYTES.items() for dtype in dtypes}
_GIT_LFS_POINTER = b"version "


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights, in the order of their names.

    Raises:
        ModelError: there are none, it is unclear which they are, or the index names one that is missing or outside.
    """
    if (folder / INDEX).exists():
        return tuple(inside(folder, name, where=folder / INDEX) for name in sorted(set(_weight_map(folder).values())))
    single = folder / SINGLE
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError("the folder holds no safetensors file", where=str(folder))
    if len(files) > 1:
        hint = "save it again with transformers' save_pretrained, which writes the index"
        what = f"{len(files)} safetensors files, and no {INDEX} to say what they are"
        raise ModelError(what, where=str(folder), hint=hint)
    return (inside(folder, files[0].name, where=folder),)


def read_tables(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's weights, by name; only headers are read.

    Raises:
        ModelError: a file is missing, damaged or outside the folder, or index and files contradict each other.
    """
    tables: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        table = read_table(file)
        twice = sorted(tables.keys() & table.keys())
        if twice:
            where = f"{tables[twice[0]].file} and {file}"
            raise ModelError(f"{twice[0]} is stored twice", where=where, hint="save the model again")
        tables |= table
    if (folder / INDEX).exists():
        _check_index(folder, tables)
    return tables


def read_table(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file, by name.

    Raises:
        ModelError: the file is cut off, or its header contradicts itself; naming the tensor where there is one.
    """
    size_bytes = file_size(file)
    header, data_start = _read_header(file, size_bytes)
    header.pop("__metadata__", None)
    tensors = [_stored(name, entry, file, data_start) for name, entry in header.items()]
    _check_layout(tensors, file, data_start, size_bytes)
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(file: Path) -> dict[str, str]:
    """What the header of a file says besides its tensors.

    Raises:
        ModelError: the header is cut off, or contradicts itself.
    """
    said = _read_header(file, file_size(file))[0].get("__metadata__", {})
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise damaged("the header's metadata cannot be read", file)
    return said


def inside(folder: Path, name: str, *, where: Path) -> Path:
    """The file `name` of `folder`, which must not lead out of it, not even through a link.

    The cache of huggingface_hub is the exception: its folders link to the blobs of the same cache.

    Raises:
        ModelError: naming the file.
    """
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        roots.append(folder.parents[2].resolve())
    path = folder / name
    # Two tests: a name may not climb out even where the links of a cache would lead back to allowed ground.
    climbs = Path(name).is_absolute() or ".." in Path(name).parts
    if climbs or not any(path.resolve().is_relative_to(root) for root in roots):
        hint = "put the file itself into the folder, and only if you trust where the folder comes from"
        raise ModelError(f"{name!r} lies outside the model's folder", where=str(where), hint=hint)
    if not path.is_file():
        raise ModelError(f"{name!r} is missing", where=str(where), hint="fetch the missing file into the folder")
    return path


def _weight_map(folder: Path) -> Mapping[str, str]:
    path = folder / INDEX
    weight_map = read_object(path).get("weight_map")
    names = weight_map if isinstance(weight_map, dict) else {}
    if not names or not all(isinstance(name, str) for name in names.values()):
        raise damaged("no weight_map from tensors to files", path)
    return names


def _check_index(folder: Path, tables: Mapping[str, StoredTensor]) -> None:
    for name, file in _weight_map(folder).items():
        if name not in tables or tables[name].file != folder / file:
            raise damaged(f"the index says that {file} holds {name}, and it does not", folder / INDEX)


def _read_header(path: Path, size_bytes: int) -> tuple[dict[str, Any], int]:
    with open_file(path) as file:
        start = file.read(_SIZE_BYTES)
        if start == _GIT_LFS_POINTER:
            raise ModelError("a git-lfs pointer, not the weights", where=str(path), hint="run git lfs pull")
        header_bytes = int.from_bytes(start, "little")
        if len(start) < _SIZE_BYTES or header_bytes > min(size_bytes - _SIZE_BYTES, _LARGEST_HEADER_BYTES):
            raise damaged(f"its header is said to have {header_bytes} bytes, and the file has {size_bytes}", path)
        return parse_object(file.read(header_bytes), path), _SIZE_BYTES + header_bytes


def _stored(name: str, entry: Any, file: Path, data_start: int) -> StoredTensor:
    """Raises ModelError unless the entry has a dtype, a shape, and as many bytes as these two ask for."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise damaged(f"the header's entry for {name} cannot be read", file)
    if begin < 0 or end < begin or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise damaged(f"the header's entry for {name} makes no sense: {entry}", file)
    needed = math.prod(shape) * _BYTES.get(dtype, 0)
    size_bytes = end - begin
    if dtype in _BYTES and size_bytes != needed:
        raise damaged(f"{name} has {size_bytes} bytes, where {dtype} {shape} takes {needed}", file)
    return StoredTensor(name, tuple(shape), dtype, file=file, offset=data_start + begin, size_bytes=size_bytes)


def _check_layout(tensors: Iterable[StoredTensor], file: Path, data_start: int, size_bytes: int) -> None:
    """Tensors follow each other without gap or overlap, from the header to the end of the file."""
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size_bytes)):
        if tensor.offset != end:
            problem = "overlaps another tensor" if tensor.offset < end else "leaves a gap before it"
            raise damaged(f"{tensor.name} {problem}", file)
        end += tensor.size_bytes
        if end > size_bytes:
            raise damaged(f"{tensor.name} ends at byte {end}, and the file has {size_bytes}", file)
    if end != size_bytes:
        raise damaged(f"{size_bytes - end} bytes behind the last tensor", file)
