"""What a method is: the way from a weight and what is known of its inputs to integer codes."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llmopt.quantize.grid import ScaleRule
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class InputStatistics:
    """What calibration saw enter a linear: the number of tokens and their second moment, Σ x xᵀ / tokens, [in, in].

    A token far larger than the others may have been scaled down, so that it is not all that the sum is made of.
    `held_out_II` is the same of tokens that are not among these, for methods that ask what is best on such.
    """

    tokens: int
    second_moment_II: Tensor
    held_out_II: Tensor | None = None


def required(inputs: InputStatistics | None) -> InputStatistics:
    """The statistics that a method cannot do without."""
    assert inputs is not None, "this method is calibrated"
    return inputs


class Method(Protocol):
    """One way to find the codes. Pure: tensors in, tensors out.

    `rows_are_independent` promises that quantizing some rows gives the same as quantizing all, so that large tables
    can be done in parts. `needs_inputs` asks for a calibration: without it `quantize` gets no statistics.
    `refits_blocks` asks for a second look at each block as a whole, once its linears are quantized. `candidates` asks
    for text to be held out, on which that one of them is chosen which does the work.
    """

    @property
    def name(self) -> str:
        """The word that people type and reports print."""
        ...

    @property
    def scales(self) -> ScaleRule:
        """What scales may be."""
        ...

    @property
    def rows_are_independent(self) -> bool:
        """Whether any subset of rows may be quantized by itself."""
        ...

    @property
    def needs_inputs(self) -> bool:
        """Whether it cannot do without statistics of the inputs."""
        ...

    @property
    def refits_blocks(self) -> bool:
        """Whether the linears of a block learn together once each is quantized."""
        ...

    @property
    def candidates(self) -> "tuple[Method, ...]":
        """Methods with independent rows that are tried for each linear, from quick to slow; none: this one is not."""
        ...

    def quantize(self, weight_OI: Tensor, scheme: Scheme, inputs: InputStatistics | None = None) -> QuantizedWeight:
        """Quantize one weight, [out, in] float32."""
        ...
