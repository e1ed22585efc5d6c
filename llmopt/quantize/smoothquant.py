"""SmoothQuant: take outliers out of the activations, and let the weights carry them.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
(arXiv 2211.10438), equation 4: s = max |x| ** alpha / max |w| ** (1 - alpha) for each input, with alpha searched.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from llmopt.quantize.fold import SMALLEST, Heads, InputSample, Scaling, normalized


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Scales that balance the range of each input against that of its weights."""

    steps: int = 10
    name: str = "smoothquant"

    def candidates(self, weight_OI: Tensor, inputs: InputSample, heads: Heads | None) -> Iterator[Scaling]:
        """s = max |x| ** alpha / max |w| ** (1 - alpha), alpha in [0, 1)."""
        activation_I, weight_I = inputs.largest_I, weight_OI.abs().amax(0)
        activation_I, weight_I = (
            size.clamp_min(SMALLEST * float(size.mean()) or 1.0) for size in (activation_I, weight_I)
        )
        for step in range(self.steps):
            alpha = step / self.steps
            yield Scaling.shared(normalized(activation_I**alpha / weight_I ** (1 - alpha)), heads)
