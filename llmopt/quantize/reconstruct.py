"""Block reconstruction as a method: GPTQ first, and then whole blocks learn (see `llmopt.pipeline.reconstruct`)."""

from dataclasses import dataclass

from llmopt.quantize.gptq import Gptq

RECONSTRUCT = "reconstruct"


@dataclass(frozen=True, kw_only=True)
class Reconstruct(Gptq):
    """GPTQ, from which the linears of a block go on together; what does not, a table, is GPTQ's, and called so."""

    refits_blocks: bool = True
