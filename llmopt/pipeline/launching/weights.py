"""The weights of one rank, quantized where a plan says so: rounded to nearest as they are read, by the whole weight.

w8a8 is computed in integers. There is no kernel in torch that reads other codes as fast as floats on a CPU: weight-only
schemes become the floats that their codes stand for, with the memory of floats.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmopt.engine.blocks import Apply, Weights, plain
from llmopt.errors import UnsupportedError
from llmopt.model.spec import Linear, ModelSpec
from llmopt.partition.runtime.cut import Cut
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
    """The linears of blocks that a plan quantizes, by the names of their weights.

    Raises:
        UsageError: a scheme is none.
        UnsupportedError: it names what is no linear of a block, or integers that this machine does not multiply.
    """
    linears = {linear.name: linear for block in spec.blocks for linear in block.linears()}
    found: dict[str, tuple[Linear, Scheme]] = {}
    for name, text in schemes.items():
        if name not in linears:
            raise UnsupportedError(f"{name} is no linear of a block, and stays a float", hint="plan without it")
        scheme = parse_scheme(text)
        if scheme.activation_bits == 8 and not available():
            raise UnsupportedError("this build of torch has no integer products", hint="plan for w8a16 or floats")
        found[linears[name].weight.name] = (linears[name], scheme)
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


def reference_linears(schemes: Quantized) -> Callable[[Weights], Apply]:
    """What a single process computes with: the definition of each scheme, without kernels."""

    def linears(weights: Weights) -> Apply:
        made: dict[str, Tensor | QuantizedWeight] = dict(weights)
        for name in weights.keys() & schemes.keys():
            linear, scheme = schemes[name]
            made[name] = Rtn().quantize(weights[name].T if linear.transposed else weights[name], scheme)

        def apply(linear: Linear, x: Tensor) -> Tensor:
            if linear.weight.name in schemes:
                return quantized_apply(made, linear, x)
            return plain(weights)(linear, x)

        return apply

    return linears


def _quantized(cut: Cut, linear: Linear, scheme: Scheme, read: Read) -> Tensor | QuantizedWeight:
    """A rank's share of a quantized weight; codes where integers are multiplied, else floats as stored.

    What is cut by outputs is quantized by itself, since rows are independent; of what is cut by inputs a rank reads
    all, for a row's scale is that of the whole row.
    """
    by_inputs = _by_inputs(cut, linear)
    stored = read(Cut(cut.tensor)) if by_inputs else read(cut)
    weight = Rtn().quantize(stored.T.contiguous() if linear.transposed else stored, scheme)
    if scheme.activation_bits == 8:
        return _some_columns(weight, cut.ranges) if by_inputs else weight
    floats_OI = weight.dequantize()
    floats = floats_OI.T.contiguous() if linear.transposed else floats_OI
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
