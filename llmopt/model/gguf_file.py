"""Models in one GGUF file, seen as the Hugging Face checkpoints that they were made from."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from llmopt.errors import UnsupportedError
from llmopt.model.gguf_config import FloatVector, architecture, config_from_gguf
from llmopt.model.gguf_header import GgufHeader, read_header
from llmopt.model.spec import ModelSpec
from llmopt.model.stored import StoredTensor, damaged, open_file


def read_config(path: Path) -> dict[str, Any]:
    """The Hugging Face config of the model in the file; tokens and weights are not read.

    Raises:
        ModelError: the file is damaged, or lacks a key.
        UnsupportedError: its version, architecture or rotary scaling is not known here.
    """
    header = read_header(path)
    try:
        return config_from_gguf(header, partial(_read_vector, header), where=str(path))
    except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise damaged(f"the metadata makes no sense: {error!r}", path) from error


def read_tables(path: Path, spec: ModelSpec) -> dict[str, StoredTensor]:
    """Every tensor of the file: by the spec's name where it has one, by its own where not.

    Raises:
        ModelError, UnsupportedError: as `read_config`.
    """
    header = read_header(path)
    names = {gguf: name for name, gguf in _gguf_names(header, spec, where=str(path)).items()}
    return {names.get(name, name): tensor for name, tensor in header.tensors.items()}


def bytes_by_type(path: Path) -> dict[str, int]:
    """How many bytes the file's tensors take in each of its types, `Q8_0` and the like, the most first.

    Raises:
        ModelError, UnsupportedError: as `read_config`.
    """
    totals: dict[str, int] = {}
    for tensor in read_header(path).tensors.values():
        totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.size_bytes
    return dict(sorted(totals.items(), key=lambda entry: -entry[1]))


def _gguf_names(header: GgufHeader, spec: ModelSpec, *, where: str) -> Mapping[str, str]:
    """What the converter calls each tensor of the spec."""
    name = architecture(header, where=where)
    arch = next(arch for arch, arch_name in MODEL_ARCH_NAMES.items() if arch_name == name)
    modules = get_tensor_name_map(arch, len(spec.blocks))
    names = {}
    for tensor in spec.tensors():
        module, _, part = tensor.name.rpartition(".")
        gguf_module = modules.get_name(module)
        if gguf_module is not None:
            names[tensor.name] = f"{gguf_module}.{part}"
    return names


def _read_vector(header: GgufHeader, name: str) -> FloatVector:
    stored = header.tensors[name]
    if stored.dtype != "F32":
        raise UnsupportedError(f"{name} is stored as {stored.dtype}, not F32", where=str(stored.file))
    with open_file(stored.file) as file:
        file.seek(stored.offset)
        return np.frombuffer(file.read(stored.size_bytes), np.float32)
