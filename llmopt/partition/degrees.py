"""Over how many devices a model can be cut whose linears have schemes: neither groups nor pairs of codes are cut."""

from collections.abc import Mapping

from llmopt.model.parallel import COMMON_DEGREES, TensorParallel, tensor_parallel, tensor_parallel_degrees
from llmopt.model.spec import Linear, ModelSpec
from llmopt.quantize.scheme import Scheme

_PAIR = 2  # codes of 8-bit products that neighbour each other are bounded together


def shared_by(spec: ModelSpec, schemes: Mapping[str, Scheme], degree: int, *, stored: bool) -> TensorParallel:
    """Whether a model can be cut over `degree` devices; see `tensor_parallel` for what a model alone asks.

    What writes to the hidden states is cut by its inputs, along which groups lie. Where weights are `stored` in their
    schemes, a device gets whole groups; what is quantized as it is read is quantized before it is cut.
    """
    found = tensor_parallel(spec, degree)
    if not found.legal or degree == 1:
        return found
    for block in spec.blocks:
        for linear in (block.attention.output, block.mlp.down):
            scheme = schemes.get(linear.name)
            obstacle = None if scheme is None else _obstacle(linear, scheme, degree, stored=stored)
            if obstacle is not None:
                return TensorParallel(degree=degree, obstacle=obstacle)
    return found


def legal_degrees(spec: ModelSpec, schemes: Mapping[str, Scheme], *, stored: bool) -> list[int]:
    """Every degree that is possible, from 1 on."""
    asked = {entry.degree for entry in tensor_parallel_degrees(spec) if entry.legal} | set(COMMON_DEGREES)
    return [degree for degree in sorted(asked) if shared_by(spec, schemes, degree, stored=stored).legal]


def _obstacle(linear: Linear, scheme: Scheme, degree: int, *, stored: bool) -> str | None:
    each = linear.in_features // degree
    if scheme.activation_bits == 8 and each % _PAIR:
        return f"{linear.name} has pairs of 8-bit codes, and {each} of its {linear.in_features} inputs cut one"
    if stored and scheme.group_size is not None and each % scheme.group_size:
        return (
            f"{linear.name} has {linear.in_features} inputs in groups of {scheme.group_size}, and a device of "
            f"{degree} would get {each} of them, which is no whole number of groups"
        )
    return None
