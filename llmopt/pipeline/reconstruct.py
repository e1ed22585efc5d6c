"""Block reconstruction: a quantized block learns to give what the float block gives.

Beside the hidden states that have gone through the quantized blocks, those of the float model are carried. When the
linears of a block are quantized, they learn together, from what enters the quantized block, to leave it as near the
float states as they can: roundings and scales (see `llmopt.quantize.learn`). Windows that nothing is learnt from say
whether that was any good; if it was not, the block stays as it was.

As in `Bounded`, a token larger than the median one counts as little as if it were as large.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmopt.engine.blocks import block_forward, embed
from llmopt.model.spec import Block, Linear
from llmopt.pipeline.calibration import Calibration, Weights
from llmopt.pipeline.calibration_text import is_held_out
from llmopt.pipeline.moments import TINY
from llmopt.pipeline.spill import States
from llmopt.quantize.execute import round_rows
from llmopt.quantize.grid import ANY_SCALE, ScaleRule
from llmopt.quantize.learn import LearnedWeight, Rates
from llmopt.quantize.weights import QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How a block learns."""

    steps: int = 100
    windows: int = 2  # looked at in a step
    rates: Rates = field(default_factory=Rates)


class Reconstruction:
    """Blocks that a calibration has just gone through are refitted: `embedding`, then `entering` and `refit` for each.

    Of several processes each has the windows that are its own, and gradients are added up.
    """

    def __init__(self, calibration: Calibration, rule: ScaleRule = ANY_SCALE, learning: Learning | None = None) -> None:
        self.calibration = calibration
        self.rule = rule
        self.learning = learning or Learning()
        self.exact = States()  # what the float model's blocks give
        count = len(calibration.windows)
        self.held_out = [index for index in range(count) if is_held_out(index)]
        self.learnt_from = [index for index in range(count) if not is_held_out(index)]

    @torch.inference_mode()
    def embedding(self, floats: Mapping[str, Tensor]) -> None:
        """Look the tokens up in the float table."""
        spec, windows = self.calibration.spec, self.calibration.windows
        self.exact = self.calibration.states()
        ids = (torch.from_numpy(windows[index])[None] for index in self.calibration.own)
        self.exact.extend(embed(spec.embedding, floats, ids_BT) for ids_BT in ids)

    def entering(self) -> States:
        """What enters the quantized block that comes next."""
        states = self.calibration.states()
        states.extend(self.calibration.hidden)
        return states

    @torch.inference_mode()
    def follow(self, block: Block, floats: Mapping[str, Tensor]) -> None:
        """Take the float states through a block; `floats` has linears as [out, in]."""

        def apply(linear: Linear, x: Tensor) -> Tensor:
            bias = floats[f"{linear.name}.bias"] if linear.bias else None
            return torch.nn.functional.linear(x, floats[linear.weight.name], bias)

        for index, state in enumerate(self.exact):
            turn = self.calibration.tables.turn(block, 0, state.shape[1])
            self.exact[index] = block_forward(block, floats, state, turn, apply=apply)

    def refit(self, block: Block, weights: Weights, floats: Mapping[str, Tensor], entering: States) -> bool:
        """Have the quantized `weights` learn, and the calibration go through them anew; False if that was no good.

        The float states are to be behind the block already.
        """
        learned = {
            name: LearnedWeight(weight, floats[name].clone(), self.learning.rates, self.rule)
            for name, weight in weights.items()
            if isinstance(weight, QuantizedWeight)
        }
        others = {name: weight.clone() for name, weight in weights.items() if isinstance(weight, Tensor)}
        if not learned or len(self.held_out) == len(self.calibration.windows):
            return False
        run = _Run(block, learned, others, self._turn(block))
        before = self._held_out_error(run, entering)
        order = torch.Generator().manual_seed(block.index)
        for step in range(self.learning.steps):
            self._step(run, entering, 1 - step / self.learning.steps, order)
        if not self._held_out_error(run, entering) < before:
            return False
        weights.update({name: weight.quantized() for name, weight in learned.items()})
        self.calibration.hidden = entering
        self.calibration.block(block, weights, None)
        return True

    def _turn(self, block: Block) -> Callable[[int], tuple[Tensor, Tensor] | None]:
        return lambda tokens: self.calibration.tables.turn(block, 0, tokens)

    def _step(self, run: "_Run", entering: States, left: float, order: torch.Generator) -> None:
        """One step from a few windows, drawn alike by all processes."""
        drawn = torch.randperm(len(self.learnt_from), generator=order)[: self.learning.windows].tolist()
        dense = run.dense()
        for index in self._own([self.learnt_from[place] for place in drawn]):
            run.error(entering[index], self.exact[index], dense).backward()  # type: ignore[no-untyped-call]
        for name, weight in run.learned.items():
            gradient = dense[name].grad
            summed_OI = torch.zeros_like(dense[name]) if gradient is None else gradient
            self.calibration.ranks.add_up(summed_OI)
            weight.step(summed_OI, left)

    @torch.no_grad()
    def _held_out_error(self, run: "_Run", entering: States) -> float:
        dense = run.dense()
        own = self._own(self.held_out)
        errors = [float(run.error(entering[index], self.exact[index], dense)) for index in own]
        return sum(self.calibration.ranks.gather(sum(errors)))

    def _own(self, windows: Sequence[int]) -> list[int]:
        """Those of some windows that this process has, by their places among its own."""
        own = self.calibration.own
        return [own.index(window) for window in windows if window in own]


@dataclass(frozen=True)
class _Run:
    """A block on some hidden states, differentiable by the weights of its linears."""

    block: Block
    learned: Mapping[str, LearnedWeight]
    others: Mapping[str, Tensor]
    turn: Callable[[int], tuple[Tensor, Tensor] | None]

    def dense(self) -> dict[str, Tensor]:
        return {name: weight.dense().requires_grad_() for name, weight in self.learned.items()}

    def error(self, entering_BTH: Tensor, exact_BTH: Tensor, dense: Mapping[str, Tensor]) -> Tensor:
        """See `block_error`."""

        def apply(linear: Linear, x: Tensor) -> Tensor:
            name = linear.weight.name
            bias = self.others[f"{linear.name}.bias"] if linear.bias else None
            if name not in self.learned:
                return torch.nn.functional.linear(x, self.others[name], bias)
            if self.learned[name].weight.scheme.activation_bits == 8:
                x = x + (round_rows(x) - x).detach()
            return torch.nn.functional.linear(x, dense[name], bias)

        turn = self.turn(entering_BTH.shape[1])
        # Copies: tensors that were made for inference only have no gradients.
        found_BTH = block_forward(self.block, self.others, entering_BTH.clone(), turn, apply=apply)
        return block_error(found_BTH, exact_BTH.clone())


def block_error(found: Tensor, exact: Tensor) -> Tensor:
    """Σ w (y - ŷ)² / Σ w y² over tokens, with w = min(1, median y² / y²); [..., T, H] each."""
    squares = exact.square().sum(-1)
    counted = (squares.median() / squares.clamp_min(TINY)).clamp_max_(1)
    errors = (found - exact).square().sum(-1)
    return (errors * counted).sum() / (squares * counted).sum().clamp_min(TINY)
