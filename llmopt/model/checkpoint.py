"""The weights of a model, checked before they are read and read one tensor at a time.

Bytes are read, not mapped: a mapped page that was touched counts as resident memory until the system wants it back, and
peak memory is one of the numbers that this project reports.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch

from llmopt.errors import ModelError, UnsupportedError
from llmopt.model import safetensors_files
from llmopt.model.decode import decodable, decode, require_finite
from llmopt.model.families import family_of
from llmopt.model.source import ModelSource
from llmopt.model.spec import ModelSpec, TensorSpec
from llmopt.model.stored import OpenFiles, StoredTensor, damaged

Array = np.ndarray[Any, Any]
Restore = Callable[[str, Array], Array]

_BUFFERS = (
    "rotary_emb.inv_freq",
    ".attn.bias",  # gpt2's causal mask
    ".attn.masked_bias",
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
_TIED_HEADS = ("lm_head.weight", "output.weight")
_DECODED_AT_ONCE = 1 << 20  # values: what a tensor takes beyond itself while it is read is a few times 4 MiB


def open_checkpoint(source: ModelSource, without: Collection[str] = ()) -> "Checkpoint":
    """Find every tensor of the source's spec, with its shape, before any weight is read; but for those `without`.

    Raises:
        ModelError: a file is damaged, or a tensor is missing or has another shape.
        UnsupportedError: a tensor has a dtype that cannot be turned into float32.
    """
    if source.gguf is not None:
        from llmopt.model.gguf_file import read_tables  # noqa: PLC0415 (needs gguf, which other models do not)

        where = str(source.gguf)
        family, stored = family_of(source.config, where=where), read_tables(source.gguf, source.spec)

        def restore(name: str, tensor: Array) -> Array:
            return family.from_gguf(name, tensor, source.config)

        return Checkpoint(source.spec, stored, where=where, restore=restore)
    assert source.folder is not None
    tables = safetensors_files.read_tables(source.folder)
    return Checkpoint(source.spec, _rename(tables, source.spec), where=str(source.folder), without=without)


class Tensors(Protocol):
    """Where weights come from: a checkpoint, or what looks like one."""

    def read(self, tensor: TensorSpec) -> torch.Tensor:
        """One tensor, float32, in its stored shape."""
        ...

    def read_rows(self, tensor: TensorSpec, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of a matrix."""
        ...


class Checkpoint:
    """Float32 tensors by their `TensorSpec`. Use it as a context manager: it keeps files open between reads.

    Tensors named in `without` need not be there, and cannot be read.
    `restore(name, tensor)` undoes what a converter did to a tensor; it leaves the tables of embedding and head alone.
    """

    def __init__(
        self,
        spec: ModelSpec,
        stored: Mapping[str, StoredTensor],
        *,
        where: str,
        restore: Restore | None = None,
        without: Collection[str] = (),
    ) -> None:
        wanted = [tensor for tensor in spec.tensors() if tensor.name not in without]
        self._stored = _select(wanted, stored, where=where, any_order=restore is not None)
        self._ignored = tuple(sorted(tensor.name for name, tensor in stored.items() if name not in self._stored))
        self._tied = spec.tied
        self._tables = {f"{spec.embedding.name}.weight", spec.head.weight.name}
        self._restore = restore
        self._files = OpenFiles()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Reading again opens them again."""
        self._files.close()

    @property
    def ignored(self) -> tuple[str, ...]:
        """Stored tensors that the model does not need: rotary and mask buffers, the copy of a tied head."""
        return self._ignored

    @property
    def unknown(self) -> tuple[str, ...]:
        """Those of the ignored tensors that checkpoints do not commonly hold besides the weights."""
        return tuple(name for name in self._ignored if not _is_harmless(name, tied=self._tied))

    @property
    def stored_bytes(self) -> int:
        """Bytes that the model's tensors take as stored."""
        return sum(tensor.size_bytes for tensor in self._stored.values())

    def stored_dtype(self, tensor: TensorSpec) -> str:
        """The format's word for how the tensor is stored: `BF16`, `Q4_K`, …"""
        return self._stored[tensor.name].dtype

    def read(self, tensor: TensorSpec) -> torch.Tensor:
        """The whole tensor, float32, contiguous, in its stored shape.

        Raises:
            ModelError: it cannot be read, or holds NaN or infinity.
        """
        return self._read(tensor, 0, self._stored[tensor.name].rows)

    def read_rows(self, tensor: TensorSpec, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of a matrix, float32 [rows, columns]; of a table, only they are read.

        Raises:
            ModelError: they cannot be read, or hold NaN or infinity.
        """
        if self._restore is not None and tensor.name not in self._tables:
            return self.read(tensor)[start:stop].clone()
        return self._read(tensor, start, stop)

    def _read(self, tensor: TensorSpec, start: int, stop: int) -> torch.Tensor:
        stored = self._stored[tensor.name]
        values = self._decode_rows(stored, start, stop)
        if self._restore is not None and tensor.name not in self._tables:
            # Copied into torch's own memory: products may round differently where a matrix is aligned differently.
            values = torch.tensor(np.ascontiguousarray(self._restore(tensor.name, values.numpy())))
        require_finite(values, name=tensor.name, file=str(stored.file), first_row=start)
        return values

    def _decode_rows(self, stored: StoredTensor, start: int, stop: int) -> torch.Tensor:
        values = torch.empty((stop - start, stored.row_values), dtype=torch.float32)
        at_once = min(max(1, _DECODED_AT_ONCE // stored.row_values), stop - start)
        buffer_RB = torch.empty((at_once, stored.row_bytes), dtype=torch.uint8)
        for first in range(start, stop, at_once):
            raw_RB = buffer_RB[: min(at_once, stop - first)]
            self._files.fill(memoryview(raw_RB.numpy().reshape(-1).data), stored, first * stored.row_bytes)
            values[first - start : first - start + len(raw_RB)] = decode(raw_RB, stored.dtype)
        return values.reshape((stop - start, *stored.shape[1:]) if len(stored.shape) > 1 else stored.shape)


def _is_harmless(name: str, *, tied: bool) -> bool:
    """Buffers that transformers once saved, tables that GGUF holds of them, and the copy of a tied head."""
    return name.endswith(_BUFFERS) or (tied and name in _TIED_HEADS)


def _rename(tables: Mapping[str, StoredTensor], spec: ModelSpec) -> dict[str, StoredTensor]:
    """By the names that the spec uses: older checkpoints leave `base_prefix` out, and some have it once too often."""
    wanted = {tensor.name for tensor in spec.tensors()}

    def renamed(name: str) -> str:
        candidates = (name, spec.base_prefix + name, name.removeprefix(spec.base_prefix))
        return next((candidate for candidate in candidates if candidate in wanted), name)

    result: dict[str, StoredTensor] = {}
    for name, tensor in tables.items():
        other = result.setdefault(renamed(name), tensor)
        if other is not tensor:
            raise damaged(f"{other.name} and {name} are the same tensor", tensor.file)
    return result


def _select(
    wanted: Sequence[TensorSpec], stored: Mapping[str, StoredTensor], *, where: str, any_order: bool
) -> dict[str, StoredTensor]:
    """What is asked for. With `any_order`, axes may stand in another order: a converter turned them round."""
    missing = [tensor.name for tensor in wanted if tensor.name not in stored]
    if missing:
        what = f"the checkpoint lacks {_first_of(missing)}"
        raise ModelError(what, where=where, hint="is the download complete, and is this the model's own config.json?")
    for tensor in wanted:
        _check(tensor, stored[tensor.name], any_order=any_order)
    return {tensor.name: stored[tensor.name] for tensor in wanted}


def _check(tensor: TensorSpec, stored: StoredTensor, *, any_order: bool) -> None:
    fits = sorted(stored.shape) == sorted(tensor.shape) if any_order else stored.shape == tensor.shape
    if not fits:
        what = f"{tensor.name} has shape {list(stored.shape)}, where the config asks for {list(tensor.shape)}"
        raise ModelError(what, where=str(stored.file), hint="is this the model's own config.json?")
    if not decodable(stored.dtype):
        hint = "use the checkpoint that it was made from, in F32, F16 or BF16"
        raise UnsupportedError(f"{tensor.name} is stored as {stored.dtype}", where=str(stored.file), hint=hint)


def _first_of(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else first
