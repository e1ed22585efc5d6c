"""The weights of one rank: floats, and codes where a plan has schemes.

w8a8 is computed in integers. There is no kernel in torch that reads other codes as fast as floats on a CPU: weight-only
schemes become the floats that their codes stand for, with the memory of floats.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from llmopt.engine.blocks import Apply, Weights, plain
from llmopt.engine.torch import Tensors
from llmopt.errors import UnsupportedError
from llmopt.measure.memory import give_back
from llmopt.model.spec import Linear, ModelSpec, TensorSpec
from llmopt.partition.runtime.cut import Cut
from llmopt.pipeline.launching.reading import Reading, as_product, sides
from llmopt.quantize.execute import round_rows, round_rows_symmetric
from llmopt.quantize.int8_torch import Int8Product, available
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import Scheme, parse_scheme
from llmopt.quantize.weights import QuantizedWeight

Quantized = Mapping[str, tuple[Linear, Scheme]]  # by the names of weights
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
    cuts: Iterator[Cut],
    reading: Reading,
    schemes: Quantized,
    placed: Callable[[Tensor], Tensor],
    *,
    symmetric: bool = False,
) -> RankWeights:
    """Read what a rank holds, one tensor after the other; `placed` puts floats where and how they are computed with.

    `symmetric` says how activations are rounded; see `Int8Product`.
    """
    found = RankWeights()
    for cut in cuts:
        name = cut.tensor.name
        if name not in schemes:
            found.floats[name] = placed(reading.floats(cut))
        else:
            linear, scheme = schemes[name]
            weight = reading.quantized(cut, linear, scheme)
            give_back()  # the floats that codes were made of
            if not isinstance(weight, QuantizedWeight):
                found.floats[name] = placed(weight)
            elif scheme.activation_bits == 8:
                found.products[linear.name] = Int8Product(weight, symmetric=symmetric)
                if sides(cut, linear)[1]:
                    found.writers.add(linear.name)
            else:
                found.floats[name] = placed(as_product(weight.dequantize(), linear))
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
    """A checkpoint in which weights that have schemes are the floats that their codes stand for."""

    def __init__(self, tensors: Tensors, schemes: Quantized) -> None:
        self._tensors, self._schemes = tensors, schemes

    def read(self, tensor: TensorSpec) -> Tensor:
        """The whole tensor, float32."""
        values = self._tensors.read(tensor)
        if tensor.name not in self._schemes:
            return values
        linear, scheme = self._schemes[tensor.name]
        return as_product(Rtn().quantize(as_product(values, linear), scheme).dequantize(), linear)


def reference_linears(schemes: Quantized, *, symmetric: bool = False) -> Callable[[Weights], Apply]:
    """What a single process computes with where activations are rounded: the definition, without kernels."""
    rounding = round_rows_symmetric if symmetric else round_rows
    rounded = {name for name, (_, scheme) in schemes.items() if scheme.activation_bits == 8}

    def linears(weights: Weights) -> Apply:
        in_floats = plain(weights)

        def apply(linear: Linear, x: Tensor) -> Tensor:
            return in_floats(linear, rounding(x) if linear.weight.name in rounded else x)

        return apply

    return linears
