"""The weights of one rank, quantized where a plan says so: rounded to nearest as they are read, by the whole weight.

w8a8 is computed in integers. There is no kernel in torch that reads other codes as fast as floats on a CPU: weight-only
schemes become the floats that their codes stand for, with the memory of floats.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmopt.engine.blocks import Apply, Weights, plain
from llmopt.engine.torch import Tensors
from llmopt.errors import UnsupportedError
from llmopt.measure.memory import give_back
from llmopt.model.spec import Linear, ModelSpec, TensorSpec
from llmopt.partition.runtime.cut import Cut
from llmopt.quantize.by_rows import round_in_place, rounded
from llmopt.quantize.execute import quantized_apply
from llmopt.quantize.int8_torch import Int8Product, available
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import Scheme, parse_scheme
from llmopt.quantize.weights import QuantizedWeight

Quantized = Mapping[str, tuple[Linear, Scheme]]  # by the names of weights
Read = Callable[[Cut], Tensor]
Agree = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class RankWeights:
    """Floats by the names of tensors, and products in integers by those of linears."""

    floats: dict[str, Tensor] = field(default_factory=dict)
    products: dict[str, Int8Product] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)  # of these, those that are cut by inputs

    @property
    def nbytes(self) -> int:
        """What they take."""
        floats = sum(weight.nbytes for weight in self.floats.values())
        return floats + sum(product.nbytes for product in self.products.values())


def parse_schemes(spec: ModelSpec, schemes: Mapping[str, str]) -> Quantized:
    """What a plan quantizes, by the names of weights. A tied head has what the embedding has.

    Raises:
        UsageError: a scheme is none.
        UnsupportedError: something else than a linear or a table is named, or integers that cannot be multiplied here.
    """
    embedding = spec.embedding
    table = Linear(name=embedding.name, out_features=embedding.vocab_size, in_features=embedding.width)
    known = {linear.name: linear for linear in (table, *spec.linears())}
    found: dict[str, tuple[Linear, Scheme]] = {}
    for name, text in schemes.items():
        if name not in known:
            raise UnsupportedError(f"{name} is no linear of this model", hint="was the plan made for it?")
        linear, scheme = known[name], parse_scheme(text)
        if scheme.activation_bits == 8 and not available():
            raise UnsupportedError("this build of torch has no integer products", hint="plan for w8a16 or floats")
        if scheme.activation_bits == 8 and linear.weight.name == table.weight.name:
            raise UnsupportedError(f"{name} is a table, and {scheme} is for products", hint="plan for w8a16 or a float")
        if found.setdefault(linear.weight.name, (linear, scheme))[1] != scheme:
            raise UnsupportedError(
                f"{name} is the embedding's table, and has another scheme", hint="give both the same"
            )
    return found


def read_weights(
    cuts: Iterator[Cut], read: Read, schemes: Quantized, placed: Callable[[Tensor], Tensor]
) -> RankWeights:
    """Read what a rank holds, one tensor after the other; `placed` puts floats where and how they are computed with."""
    found = RankWeights()
    for cut in cuts:
        name = cut.tensor.name
        if name not in schemes:
            found.floats[name] = placed(read(cut))
        else:
            linear, scheme = schemes[name]
            weight = _quantized(cut, linear, scheme, read)
            if isinstance(weight, QuantizedWeight):
                found.products[linear.name] = Int8Product(weight)
                if _by_inputs(cut, linear):
                    found.writers.add(linear.name)
            else:
                found.floats[name] = placed(weight)
            del weight
        give_back()  # what reading and rounding took
    return found


def rank_linears(weights: RankWeights, agree: Agree | None) -> Callable[[Weights], Apply]:
    """How linears are applied: integer products where there are some.

    Where ranks share a stage, what writes to the hidden states reads activations of which each has some channels:
    `agree` gives the largest values that any of them has, so that all round as a single process would.
    """

    def linears(floats: Weights) -> Apply:
        in_floats = plain(floats)

        def apply(linear: Linear, x: Tensor) -> Tensor:
            product = weights.products.get(linear.name)
            if product is None:
                return in_floats(linear, x)
            y = product(x, agree if linear.name in weights.writers else None)
            return y + floats[f"{linear.name}.bias"] if linear.bias else y

        return apply

    return linears


class ReferenceTensors:
    """A checkpoint in which weights of weight-only schemes are the floats that their codes stand for."""

    def __init__(self, tensors: Tensors, schemes: Quantized) -> None:
        self._tensors, self._schemes = tensors, schemes

    def read(self, tensor: TensorSpec) -> Tensor:
        """The whole tensor, float32."""
        values = self._tensors.read(tensor)
        if tensor.name not in self._schemes or self._schemes[tensor.name][1].activation_bits == 8:
            return values
        linear, scheme = self._schemes[tensor.name]
        floats_OI = Rtn().quantize(_as_product(values, linear), scheme).dequantize()
        return _as_product(floats_OI, linear)


def reference_linears(schemes: Quantized) -> Callable[[Weights], Apply]:
    """What a single process computes with where activations are rounded: the definition, without kernels."""
    rounding = {name: found for name, found in schemes.items() if found[1].activation_bits == 8}

    def linears(weights: Weights) -> Apply:
        made: dict[str, Tensor | QuantizedWeight] = dict(weights)
        for name in weights.keys() & rounding.keys():
            linear, scheme = rounding[name]
            made[name] = Rtn().quantize(_as_product(weights[name], linear), scheme)

        def apply(linear: Linear, x: Tensor) -> Tensor:
            if linear.weight.name in rounding:
                return quantized_apply(made, linear, x)
            return plain(weights)(linear, x)

        return apply

    return linears


def _as_product(values: Tensor, linear: Linear) -> Tensor:
    """A stored weight as [out, in], and the other way round."""
    return values.T.contiguous() if linear.transposed else values


def _quantized(cut: Cut, linear: Linear, scheme: Scheme, read: Read) -> Tensor | QuantizedWeight:
    """A rank's share of a quantized weight; codes where integers are multiplied, else floats as stored.

    What is cut by outputs is quantized by itself, since rows are independent; of what is cut by inputs a rank reads
    all, for a row's scale is that of the whole row.
    """
    by_inputs = _by_inputs(cut, linear)
    stored = read(Cut(cut.tensor)) if by_inputs else read(cut)
    if scheme.activation_bits == 8:
        weight = rounded(_as_product(stored, linear), scheme)
        return _some_columns(weight, cut.ranges) if by_inputs else weight
    floats = _as_product(round_in_place(_as_product(stored, linear), scheme), linear)
    return cut.take(floats) if by_inputs else floats


def _by_inputs(cut: Cut, linear: Linear) -> bool:
    return bool(cut.ranges) and cut.axis == (0 if linear.transposed else 1)


def _some_columns(weight: QuantizedWeight, ranges: tuple[tuple[int, int], ...]) -> QuantizedWeight:
    """Some inputs of a weight with a scale a row. Pairs of neighbours, which fit the kernel, stay pairs."""
    assert all(start % 2 == 0 for start, _ in ranges), "codes would saturate"
    codes_OI = torch.cat([weight.codes_OI[:, start:stop] for start, stop in ranges], 1)
    return QuantizedWeight(
        scheme=weight.scheme, codes_OI=codes_OI, scales_OG=weight.scales_OG, zero_points_OG=weight.zero_points_OG
    )
