"""What may be said of quantization-aware training."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from llmopt.errors import UsageError

# On the demo model, from GPTQ: 0.001 lowers the divergence slowly, 0.005 doubles it.
RATE = 0.002
STEPS = 400  # where neither steps nor minutes are given
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True, kw_only=True)
class QatOptions:
    """What the model learns from, how long, and what of it learns.

    `cross_entropy` is the share of the text's own cross entropy in the loss, the rest of which is the divergence from
    the float model. With a `lora_rank` weights move by products of thin matrices of that rank. `by_block` trains one
    block at a time, towards what the float model's gives, for models that do not fit into memory as a whole.
    `shard` divides what training takes among several processes; None: if it does not fit into memory otherwise.
    """

    data: str | Path | None = None  # text, or the name of a dataset; None: what comes with llmopt
    steps: int | None = None
    batch: int = 2  # windows in a step
    cross_entropy: float = 0.0
    lora_rank: int | None = None
    by_block: bool = False
    precision: str = "fp32"
    rate: float = RATE  # of latent weights, in codes a step; that of step sizes goes with it
    shard: bool | None = None

    def check(self) -> None:
        """See that it can be done.

        Raises:
            UsageError: it cannot.
        """
        if not 0.0 <= self.cross_entropy <= 1.0:
            what = f"a share of {self.cross_entropy:g} of cross entropy in the loss"
            raise UsageError(what, hint="0 is distillation alone, 1 the text alone")
        if self.by_block and self.cross_entropy:
            what = "a block by itself gives no tokens, so there is no cross entropy to learn from"
            raise UsageError(what, hint="leave the cross entropy out, or train the whole model")
        if self.by_block and self.shard:
            what = "a block by itself is not divided among processes"
            raise UsageError(what, hint="leave --shard out, or train the whole model")
        if not 0.0 < self.rate < 1.0:
            raise UsageError(f"a rate of {self.rate:g} codes a step", hint=f"more than 0 and below 1, such as {RATE:g}")
        if self.precision not in PRECISIONS:
            raise UsageError(f"there is no precision {self.precision!r}", hint=f"one of {', '.join(PRECISIONS)}")

    def entry(self) -> Mapping[str, str | bool | int | float | None]:
        """As a manifest holds it, without the text, which has an entry of its own, and what changes no result."""
        return {name: value for name, value in asdict(self).items() if name not in {"data", "shard"}}
