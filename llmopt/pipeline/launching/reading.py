"""How a rank gets what it holds of a tensor: from a model of floats, from one of integers, or from its own shard."""

from typing import Protocol

import torch
from torch import Tensor

from llmopt.errors import UnsupportedError
from llmopt.export.checkpoint.packed import Ranges
from llmopt.model.checkpoint import Tensors
from llmopt.model.spec import Linear
from llmopt.partition.runtime.cut import Cut
from llmopt.pipeline.stored_weights import StoredWeights
from llmopt.quantize.by_rows import round_in_place, rounded
from llmopt.quantize.int8 import sums_fit
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight


class Reading(Protocol):
    """Where a rank's weights come from."""

    def floats(self, cut: Cut) -> Tensor:
        """The values of a cut, float32."""
        ...

    def quantized(self, cut: Cut, linear: Linear, scheme: Scheme) -> Tensor | QuantizedWeight:
        """A rank's share of a weight that has a scheme: codes, or, where only those will do, the floats of a cut."""
        ...


class RoundedAsRead:
    """A model of floats, rounded to nearest where a plan says so."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def floats(self, cut: Cut) -> Tensor:
        """See `Reading`."""
        return cut.read(self._tensors)

    def quantized(self, cut: Cut, linear: Linear, scheme: Scheme) -> Tensor | QuantizedWeight:
        """See `Reading`; codes where integers are multiplied, else floats, for a group may lie on two ranks.

        What is cut by outputs is quantized by itself, since rows are independent; of what is cut by inputs a rank
        reads all, for a row's scale is that of the whole row.
        """
        _, columns = sides(cut, linear)
        stored = self.floats(Cut(cut.tensor) if columns else cut)
        if scheme.activation_bits == 8:
            weight = rounded(as_product(stored, linear), scheme)
            return _some_columns(weight, columns) if columns else weight
        floats = as_product(round_in_place(as_product(stored, linear), scheme), linear)
        return cut.take(floats) if columns else floats


class AsStored:
    """A model whose weights are stored as integers: its own codes and scales."""

    def __init__(self, stored: StoredWeights) -> None:
        self._stored = stored

    def floats(self, cut: Cut) -> Tensor:
        """See `Reading`."""
        return cut.read(self._stored.floats)

    def quantized(self, cut: Cut, linear: Linear, scheme: Scheme) -> QuantizedWeight:
        """See `Reading`.

        Raises:
            UnsupportedError: another program made codes that integer products here do not bear.
        """
        rows, columns = sides(cut, linear)
        return sound(self._stored.quantized(cut.tensor, rows=rows, columns=columns), linear.name)


def sound(weight: QuantizedWeight, name: str) -> QuantizedWeight:
    """The weight, if its products are exact.

    Raises:
        UnsupportedError: sums of two of them would saturate.
    """
    if weight.scheme.activation_bits == 8 and not sums_fit(weight.codes_OI):
        what = f"{name} has neighbouring 8-bit codes whose products saturate where a CPU has no VNNI"
        raise UnsupportedError(what, hint="llmopt quantize writes such as do not")
    return weight


def sides(cut: Cut, linear: Linear) -> tuple[Ranges, Ranges]:
    """Which outputs and which inputs a cut keeps; none: all."""
    by_inputs = bool(cut.ranges) and cut.axis == (0 if linear.transposed else 1)
    return ((), cut.ranges) if by_inputs else (cut.ranges, ())


def as_product(values: Tensor, linear: Linear) -> Tensor:
    """A stored weight as [out, in], and the other way round."""
    return values.T.contiguous() if linear.transposed else values


def _some_columns(weight: QuantizedWeight, ranges: Ranges) -> QuantizedWeight:
    """Some inputs of a weight with a scale a row. Pairs of neighbours, which fit the kernel, stay pairs."""
    assert all(start % 2 == 0 for start, _ in ranges), "codes would saturate"
    codes_OI = torch.cat([weight.codes_OI[:, start:stop] for start, stop in ranges], 1)
    return QuantizedWeight(
        scheme=weight.scheme, codes_OI=codes_OI, scales_OG=weight.scales_OG, zero_points_OG=weight.zero_points_OG
    )
