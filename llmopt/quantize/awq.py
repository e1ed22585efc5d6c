"""AWQ: give the weights of large inputs more of the grid.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (arXiv 2306.00978),
section 3.2: s = mean |x| ** alpha for each input, with alpha searched between 0 and 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from llmopt.quantize.fold import SMALLEST, Heads, InputSample, Scaling, normalized


@dataclass(frozen=True, kw_only=True)
class Awq:
    """Scales that follow the size of the inputs alone."""

    steps: int = 10
    name: str = "awq"

    def candidates(self, weight_OI: Tensor, inputs: InputSample, heads: Heads | None) -> Iterator[Scaling]:
        """s = mean |x| ** alpha, alpha in (0, 1]."""
        size_I = inputs.tokens_NI.abs().mean(0)
        size_I = size_I.clamp_min(SMALLEST * float(size_I.mean()) or 1.0)
        for step in range(1, self.steps + 1):
            yield Scaling.shared(normalized(size_I ** (step / self.steps)), heads)
