"""What enters linears, as it comes window by window: its second moment, or a sample of it. Several processes add up."""

from collections.abc import Callable

import torch
from torch import Tensor

from llmopt.engine.blocks import Apply
from llmopt.errors import LlmoptError
from llmopt.model.spec import Block, Linear
from llmopt.pipeline.finite import OVERFLOW_HINT
from llmopt.pipeline.ranks import ALONE, Ranks
from llmopt.quantize.fold import InputSample
from llmopt.quantize.method import InputStatistics

PANELS, MIN_PANEL = 4, 64
TINY = torch.finfo(torch.float32).tiny


class Bounded:
    """Makes tokens whose inputs are larger than those of the median token just as large.

    The first token of a text, and a few others, have activations hundreds of times as large as the rest (Sun et al.
    2024, "Massive Activations in Large Language Models", arXiv 2402.17762). Squared they would be most of every sum,
    and weights would be fitted to them alone, though the norm behind takes their size away.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.typical = 0.0  # squared size, of the median token in the first window that has any
        self.is_agreed = False

    def __call__(self, x_NI: Tensor) -> Tensor:
        """The inputs of some tokens, [tokens, in], none of them larger than a typical one."""
        square_N = x_NI.square().sum(-1)
        if self.typical == 0:
            self.agree(float(square_N.median()) or float(square_N.mean()))
        return x_NI * (self.typical / square_N.clamp_min(TINY)).clamp_max_(1).sqrt_()[:, None]

    def agree(self, typical: float = 0.0) -> None:
        """Take the size that the first process found which found any; asked once, when each has seen a window."""
        if not self.is_agreed:
            self.is_agreed = True
            typical = next(filter(None, self.ranks.gather(typical)), 0.0)
        self.typical = typical


class Moment:
    """The second moment of inputs that come window by window, bounded.

    It is symmetric, and products of panels that lie above the diagonal are not computed: 5/8 of the work with 4 panels.
    """

    def __init__(self, width: int, ranks: Ranks = ALONE, bounded: Bounded | None = None) -> None:
        self.ranks = ranks
        self.sum_II = torch.zeros((width, width))  # below the diagonal, and a little above it
        self.tokens = 0
        self.bounded = bounded or Bounded(ranks)
        self.panel = max(MIN_PANEL, -(-width // PANELS))

    def add(self, x_BTI: Tensor) -> None:
        """Add Σ x xᵀ over all tokens."""
        x_NI = self.bounded(x_BTI.flatten(0, -2))
        for start in range(0, x_NI.shape[1], self.panel):
            stop = start + self.panel
            self.sum_II[start:, start:stop].addmm_(x_NI[:, start:].T, x_NI[:, start:stop])
        self.tokens += len(x_NI)

    def statistics(self, name: str) -> InputStatistics:
        """The mean, over the tokens of all processes.

        Raises:
            LlmoptError: the inputs of the linear of that name are not finite, or there were none.
        """
        if not self.bounded.is_agreed:  # this process had no window of those that were looked at
            self.bounded.agree()
        self.ranks.add_up(self.sum_II)
        tokens = sum(self.ranks.gather(self.tokens))
        if tokens == 0:
            hint = "give more text with --calib, or --ignore the linear"
            raise LlmoptError("no token of the calibration text reached a linear", where=name, hint=hint)
        if not bool(self.sum_II.isfinite().all()):
            what = "in calibration the inputs of a linear are NaN or infinite, or their squares are"
            raise LlmoptError(what, where=name, hint=OVERFLOW_HINT)
        lower_II = self.sum_II.tril().div_(tokens)
        return InputStatistics(tokens=tokens, second_moment_II=lower_II + lower_II.tril(-1).T)


class Sampler:
    """Every so many of the inputs that come window by window, bounded; `seen` of them other processes have before."""

    def __init__(self, stride: int, seen: int, ranks: Ranks) -> None:
        self.stride = stride
        self.seen = seen
        self.ranks = ranks
        self.bounded = Bounded(ranks)
        self.rows: list[Tensor] = []
        self.largest_I = torch.zeros(())

    def add(self, x_BTI: Tensor) -> None:
        """Look at some more."""
        x_NI = self.bounded(x_BTI.flatten(0, -2))
        self.rows.append(x_NI[-self.seen % self.stride :: self.stride].clone())
        self.largest_I = torch.maximum(self.largest_I, x_NI.abs().amax(0))
        self.seen += len(x_NI)

    def sample(self) -> InputSample:
        """What all processes kept."""
        found = self.ranks.gather((torch.cat(self.rows), self.largest_I))
        return InputSample(
            tokens_NI=torch.cat([tokens_NI for tokens_NI, _ in found]),
            largest_I=torch.stack([largest_I for _, largest_I in found]).amax(0),
        )


class BlockSampler:
    """Samples what enters the linears of a block, by the name of the first that reads it."""

    def __init__(self, block: Block, apply: Apply, sampler: Callable[[], Sampler]) -> None:
        readers = (block.attention.inputs[0], block.attention.output, block.mlp.inputs[0], block.mlp.down)
        self.samplers = {linear.name: sampler() for linear in readers}
        self.inner = apply

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        """What a linear gives, by the `apply` that was given."""
        if linear.name in self.samplers:
            self.samplers[linear.name].add(x)
        return self.inner(linear, x)

    def samples(self) -> dict[str, InputSample]:
        """What all processes kept."""
        return {name: sampler.sample() for name, sampler in self.samplers.items()}
