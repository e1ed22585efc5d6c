"""Weights of compressed-tensors read back as they were stored: codes, scales and zero points, or some of them.

The layout is that of `compressed_tensors`. Of a weight that is cut, only what is kept stays in memory.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmopt.errors import ModelError, UnsupportedError
from llmopt.export.checkpoint.compressed_tensors import CompressedTensors
from llmopt.export.checkpoint.files import DTYPES
from llmopt.model.decode import decode
from llmopt.model.spec import Linear
from llmopt.model.stored import OpenFiles, StoredTensor
from llmopt.quantize.int8 import CENTER
from llmopt.quantize.pack import unpack_bytes
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

Range = tuple[int, int]
Ranges = tuple[Range, ...]  # one behind the other; none: all

_SCALES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_UNPACKED_AT_ONCE = 1 << 24  # codes


class PackedWeights:
    """The quantized weights of a checkpoint whose tensors are `stored`, by their names."""

    def __init__(self, stored: Mapping[str, StoredTensor], *, where: str) -> None:
        self._stored, self._where = stored, where
        self._files = OpenFiles()

    def require(self, linear: Linear, scheme: Scheme) -> None:
        """See that a weight is there, in the shape that its scheme says.

        Raises:
            ModelError: a tensor is missing, or is another.
            UnsupportedError: its inputs are in another order.
        """
        if (order := self._stored.get(f"{linear.name}.weight_g_idx")) is not None:
            raise UnsupportedError(f"{linear.name} has its inputs in an order of their own", where=str(order.file))
        for entry in CompressedTensors(self.scale_dtype(linear)).entries(linear, scheme):
            if entry.name not in self._stored:
                raise ModelError(f"the checkpoint lacks {entry.name}", where=self._where, hint="is it complete?")
            found = self._stored[entry.name]
            if (found.dtype, found.shape) != (DTYPES[entry.dtype], entry.shape):
                what = f"{entry.name} is {found.dtype} {list(found.shape)}, where {scheme} takes"
                raise ModelError(f"{what} {DTYPES[entry.dtype]} {list(entry.shape)}", where=str(found.file))

    def scale_dtype(self, linear: Linear) -> torch.dtype:
        """The dtype that the scales of a weight are stored in."""
        found = self._stored.get(f"{linear.name}.weight_scale")
        return torch.float32 if found is None else _SCALES.get(found.dtype, torch.float32)

    def read_integers(self, linear: Linear, scheme: Scheme, rows: Ranges = (), columns: Ranges = ()) -> QuantizedWeight:
        """Some rows (outputs) and columns (inputs) of a weight; columns begin and end with groups.

        Raises:
            ModelError: it cannot be read.
        """
        rows, columns = rows or ((0, linear.out_features),), columns or ((0, linear.in_features),)
        size = scheme.group_size or linear.in_features
        whole = scheme.group_size is None
        assert whole or all(edge % size == 0 for edges in columns for edge in edges), "groups are cut"
        groups: Ranges = ((0, 1),) if whole else tuple((start // size, stop // size) for start, stop in columns)
        zeros_OG = None if scheme.symmetric else _taken(self._zero_points(linear, scheme), rows, groups)
        return QuantizedWeight(
            scheme=scheme,
            codes_OI=torch.cat([self._codes(linear, scheme, part, columns) for part in rows]),
            scales_OG=_taken(self._floats(f"{linear.name}.weight_scale"), rows, groups),
            zero_points_OG=zeros_OG,
        )

    def close(self) -> None:
        """Close the files. Reading again opens them again."""
        self._files.close()

    def _codes(self, linear: Linear, scheme: Scheme, rows: Range, columns: Ranges) -> Tensor:
        name = f"{linear.name}.weight" if scheme.activation_bits == 8 else f"{linear.name}.weight_packed"
        at_once = max(1, _UNPACKED_AT_ONCE // linear.in_features)
        kept = torch.empty((rows[1] - rows[0], sum(stop - start for start, stop in columns)), dtype=torch.uint8)
        for first in range(*rows, at_once):
            stop = min(first + at_once, rows[1])
            codes_OI = _unpacked(self._raw(name, first, stop), scheme, linear.in_features)
            kept[first - rows[0] : stop - rows[0]] = _columns(codes_OI, columns)
        return kept

    def _zero_points(self, linear: Linear, scheme: Scheme) -> Tensor:
        """[out, groups], which lie in words along the rows."""
        words_WG = self._whole(f"{linear.name}.weight_zero_point").view(torch.int32)
        return _unpacked(words_WG.T.contiguous().view(torch.uint8), scheme, linear.out_features).T.contiguous()

    def _floats(self, name: str) -> Tensor:
        stored = self._stored[name]
        return decode(self._whole(name), stored.dtype).reshape(stored.shape)

    def _whole(self, name: str) -> Tensor:
        return self._raw(name, 0, self._stored[name].rows)

    def _raw(self, name: str, first: int, stop: int) -> Tensor:
        """Rows as bytes, uint8 [rows, bytes a row]."""
        stored = self._stored[name]
        raw_RB = torch.empty((stop - first, stored.row_bytes), dtype=torch.uint8)
        self._files.fill(memoryview(raw_RB.numpy().reshape(-1).data), stored, first * stored.row_bytes)
        return raw_RB


def _unpacked(raw_RB: Tensor, scheme: Scheme, count: int) -> Tensor:
    """Rows of bytes as `count` codes each, from 0 up."""
    if scheme.activation_bits == 8:
        return (raw_RB.view(torch.int8).to(torch.int16) + CENTER).to(torch.uint8)
    if scheme.bits < 8:
        return torch.from_numpy(unpack_bytes(raw_RB.numpy(), scheme.bits, count))
    return raw_RB[:, :count]


def _columns(values: Tensor, ranges: Ranges) -> Tensor:
    parts = [values[:, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _taken(values: Tensor, rows: Ranges, columns: Ranges) -> Tensor:
    return torch.cat([_columns(values[start:stop], columns) for start, stop in rows]).contiguous()
