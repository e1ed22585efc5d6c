"""Several methods on each linear, and the one that is best on text that none of them was fitted to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.quantize.gptq import Gptq
from llmopt.quantize.grid import ANY_SCALE, ScaleRule
from llmopt.quantize.method import InputStatistics, Method, required
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.search import Search
from llmopt.quantize.weights import QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Rounding to nearest, the search of ranges or GPTQ, whichever errs least in the outputs of held-out tokens.

    Then blocks learn as in `reconstruct`, which itself keeps what is better on held-out text.
    """

    scales: ScaleRule = ANY_SCALE
    name: str = "auto"
    rows_are_independent: bool = False  # what is chosen is chosen for all of them
    needs_inputs: bool = True
    refits_blocks: bool = True

    @property
    def candidates(self) -> tuple[Method, ...]:
        """What is tried, from quick to slow."""
        return Rtn(scales=self.scales), Search(scales=self.scales), Gptq(scales=self.scales)

    def quantize(self, weight_OI: Tensor, scheme: Scheme, inputs: InputStatistics | None = None) -> QuantizedWeight:
        """Quantize one weight, [out, in] float32, by the best of all candidates."""
        moment_II = required(inputs).held_out_II
        assert moment_II is not None, "this method is judged on held-out tokens"
        found = [candidate.quantize(weight_OI, scheme, inputs) for candidate in self.candidates]
        return min(found, key=lambda quantized: output_square(weight_OI - quantized.dequantize(), moment_II))


def output_square(weight_OI: Tensor, moment_II: Tensor) -> float:
    """Mean ‖W x‖² of tokens whose second moment H is given: tr(W H Wᵀ)."""
    square = ((weight_OI @ moment_II) * weight_OI).sum(dtype=torch.float64)
    return max(0.0, float(square))  # sums of float32 may fall a little below
