"""Round to nearest: no calibration, each weight to the nearest point of its group's grid."""

from dataclasses import dataclass

from torch import Tensor

from llmopt.quantize.grid import ANY_SCALE, ScaleRule, find_grid, quantize_to, shrinks_to_try
from llmopt.quantize.int8 import quantize_rows
from llmopt.quantize.method import InputStatistics, Method
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class Rtn:
    """Round to nearest, with each group's range searched by mean squared error below 8 bits.

    At 8 bits the full range is best within the noise, and no search is made.
    """

    clip_steps: int = 8
    clip_range: float = 0.3  # the tightest range tried is this much smaller than the full one
    scales: ScaleRule = ANY_SCALE
    name: str = "rtn"
    rows_are_independent: bool = True
    needs_inputs: bool = False
    refits_blocks: bool = False
    candidates: tuple[Method, ...] = ()

    def quantize(self, weight_OI: Tensor, scheme: Scheme, inputs: InputStatistics | None = None) -> QuantizedWeight:
        """Quantize one weight, [out, in] float32. `inputs` is not used: rounding looks at the weight alone."""
        if scheme.activation_bits == 8:
            return quantize_rows(weight_OI, scheme, self.scales)
        shrinks = shrinks_to_try(scheme, self.clip_range, self.clip_steps if scheme.bits < 8 else 1)
        return quantize_to(weight_OI, scheme, *find_grid(weight_OI, scheme, shrinks, rule=self.scales))
