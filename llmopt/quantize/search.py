"""Round to nearest on the grid that the inputs ask for: an error counts as much as what it is multiplied by."""

from dataclasses import dataclass

from torch import Tensor

from llmopt.quantize.grid import ANY_SCALE, ScaleRule, find_grid, quantize_to, shrinks_to_try, without_dead_outliers
from llmopt.quantize.int8 import quantize_rows
from llmopt.quantize.method import InputStatistics, Method, required
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class Search:
    """Each group's range searched by squared error, weighted by the second moment of each input.

    That is the error of the outputs if inputs were uncorrelated; llama.cpp calls the weights an importance matrix.
    """

    clip_steps: int = 16
    clip_range: float = 0.5  # the tightest range tried is this much smaller than the full one
    scales: ScaleRule = ANY_SCALE
    name: str = "search"
    rows_are_independent: bool = True
    needs_inputs: bool = True
    refits_blocks: bool = False
    candidates: tuple[Method, ...] = ()

    def quantize(self, weight_OI: Tensor, scheme: Scheme, inputs: InputStatistics | None = None) -> QuantizedWeight:
        """Quantize one weight, [out, in] float32."""
        return self.round_to_grid(weight_OI, scheme, required(inputs).second_moment_II.diagonal())

    def round_to_grid(self, weight_OI: Tensor, scheme: Scheme, importance_I: Tensor) -> QuantizedWeight:
        """The same, from the mean square of each input, [in]."""
        weight_OI = without_dead_outliers(weight_OI, importance_I, scheme.group_size)
        if scheme.activation_bits == 8:
            return quantize_rows(weight_OI, scheme, self.scales)
        shrinks = shrinks_to_try(scheme, self.clip_range, self.clip_steps)
        return quantize_to(weight_OI, scheme, *find_grid(weight_OI, scheme, shrinks, importance_I, self.scales))
