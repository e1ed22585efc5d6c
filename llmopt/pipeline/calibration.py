"""One pass of text through the model, block by block, in which every linear sees the inputs that it will have.

The hidden states of all windows go through a block in four steps, one for each group of linears that share an input.
Before a group is quantized, what enters it is summed up; behind it, the windows go on through the quantized weights, so
each layer is fitted to what the layers before it really give. One block is in memory, and as much of the hidden states
as `States` keeps there.

Of several processes each has some of the windows, and they add up what they find.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmopt.engine.base import TokenIds
from llmopt.engine.blocks import RotaryTables, activated, block_forward, embed, head_inputs, mixed, normalize
from llmopt.model.spec import Block, Linear, ModelSpec, Norm, TensorSpec
from llmopt.pipeline.calibration_text import is_held_out, require_tokens
from llmopt.pipeline.moments import BlockSampler, Moment, Sampler
from llmopt.pipeline.ranks import ALONE, Ranks
from llmopt.pipeline.spill import States
from llmopt.quantize.execute import round_rows
from llmopt.quantize.fold import InputSample
from llmopt.quantize.method import InputStatistics
from llmopt.quantize.weights import QuantizedWeight

Weights = dict[str, Tensor | QuantizedWeight]
# Quantizes some linears that share their input, whose statistics these are, and puts them among the weights.
QuantizeGroup = Callable[[Sequence[Linear], InputStatistics], None]


KEPT_BYTES = 2**28  # of what enters the widest products; more is computed twice
SAMPLED_TOKENS = 512
HEAD_TOKENS = 8192


@dataclass
class Calibration:
    """Windows of text on their way through the model: `embedding`, then `block` for each block, then `head`.

    `windows` are those of all processes, `hidden` the states of those that this one has. With `holds_out`, statistics
    are of seven windows of eight, and those of the others stand beside them.

    Raises:
        UsageError: see `require_tokens`.
    """

    spec: ModelSpec
    windows: Sequence[TokenIds]
    ranks: Ranks = ALONE
    states: Callable[[], States] = States  # where activations of all windows are kept
    holds_out: bool = False
    hidden: States = field(default_factory=States, init=False)

    def __post_init__(self) -> None:
        """Fail before anything is read."""
        require_tokens(self.spec, self.windows, self.ranks, holds_out=self.holds_out)
        self.own = range(len(self.windows))[self.ranks.shares(len(self.windows))[self.ranks.rank]]
        self.tables = RotaryTables(self.spec, max(map(len, self.windows)))

    @torch.inference_mode()
    def embedding(self, weights: Weights) -> None:
        """Look the tokens up in the table as it is stored."""
        dense = {name: densify(weight) for name, weight in weights.items()}
        self.hidden = self.states()
        self.hidden.extend(self._embedded(index, dense) for index in self.own)

    @torch.inference_mode()
    def head_in_float(self, read: Callable[[Iterable[TensorSpec]], dict[str, Tensor]]) -> InputStatistics:
        """What enters the head of the float model, whose tensors `read` gives by name; of some of the windows.

        A tied head is quantized with the embedding, before anything has gone through the blocks.
        """
        stride = max(1, sum(map(len, self.windows)) // HEAD_TOKENS)
        table = read(self.spec.embedding.tensors())
        looked_at = [index for index in self.own if index % stride == 0]
        hidden = [self._embedded(index, table) for index in looked_at]
        del table
        for block in self.spec.blocks:
            floats = read(block.tensors())
            for index, state in enumerate(hidden):
                hidden[index] = block_forward(block, floats, state, self.tables.turn(block, 0, state.shape[1]))
        weights = read(self.spec.tensors_before_head())
        inputs = (head_inputs(self.spec, weights, state) for state in hidden)
        return self._statistics(self.spec.head, inputs, [index // stride for index in looked_at])

    @torch.inference_mode()
    def look(self, block: Block, floats: Mapping[str, Tensor]) -> dict[str, InputSample]:
        """What enters the linears of a block while none of them is quantized, by the name of the first that reads it.

        The windows stay where they are. `floats` has linears as [out, in].
        """
        stride = max(1, sum(map(len, self.windows)) // SAMPLED_TOKENS)
        seen = sum(map(len, self.windows[: self.own.start]))

        def apply(linear: Linear, x: Tensor) -> Tensor:
            bias = floats[f"{linear.name}.bias"] if linear.bias else None
            return torch.nn.functional.linear(x, floats[linear.weight.name], bias)

        sampler = BlockSampler(block, apply, lambda: Sampler(stride, seen, self.ranks))
        for hidden in self.hidden:
            block_forward(block, floats, hidden, self.tables.turn(block, 0, hidden.shape[1]), apply=sampler.apply)
        return sampler.samples()

    @torch.inference_mode()
    def block(self, block: Block, weights: Weights, quantize: QuantizeGroup | None) -> None:
        """Have the linears of a block quantized, group by group, and go through it.

        `weights` holds its norms, and what `quantize` puts there; all that the block has, if `quantize` is None, and
        then the hidden states are the same to the last bit as behind the run that made them.
        """
        run = _BlockRun(weights)
        norms = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
        attention, mlp = block.attention, block.mlp

        def enter(norm: Norm, hidden: Tensor) -> Tensor:
            return normalize(norm, norms, hidden)

        def add(index: int, branch: Tensor, post_norm: Norm | None) -> None:
            self.hidden[index] = self.hidden[index] + (branch if post_norm is None else enter(post_norm, branch))

        def fit(linears: Sequence[Linear], inputs: Iterable[Tensor]) -> None:
            if quantize is not None:
                quantize(linears, self._statistics(linears[0], inputs, self.own))

        fit(attention.inputs, (enter(block.attention_norm, hidden) for hidden in self.hidden))
        heads = self.states()
        for hidden in self.hidden:
            turn = self.tables.turn(block, 0, hidden.shape[1])
            heads.append(mixed(attention, norms, enter(block.attention_norm, hidden), turn, apply=run.apply))
        fit([attention.output], heads)
        for index, values in enumerate(heads):
            add(index, run.apply(attention.output, values), block.attention_post_norm)
        del heads
        fit(mlp.inputs, (enter(block.mlp_norm, hidden) for hidden in self.hidden))

        def inner() -> Iterator[Tensor]:
            return (activated(mlp, enter(block.mlp_norm, hidden), run.apply) for hidden in self.hidden)

        wide = 4 * mlp.down.in_features * sum(len(self.windows[index]) for index in self.own)
        kept = list(inner()) if wide <= KEPT_BYTES else None
        fit([mlp.down], inner() if kept is None else kept)
        for index, x in enumerate(inner() if kept is None else kept):
            add(index, run.apply(mlp.down, x), block.mlp_post_norm)

    @torch.inference_mode()
    def head(self, weights: Weights) -> InputStatistics:
        """What enters the head."""
        plain = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
        inputs = (head_inputs(self.spec, plain, hidden) for hidden in self.hidden)
        return self._statistics(self.spec.head, inputs, self.own)

    def _embedded(self, index: int, table: Mapping[str, Tensor]) -> Tensor:
        return embed(self.spec.embedding, table, torch.from_numpy(self.windows[index])[None])

    def _statistics(self, linear: Linear, inputs: Iterable[Tensor], windows: Sequence[int]) -> InputStatistics:
        """Of inputs window by window; `windows` are the places of these among all that are looked at."""
        fitted = Moment(linear.in_features, self.ranks)
        # One bound for both: processes agree on it when each has seen a window, of whichever kind that is.
        judged = Moment(linear.in_features, self.ranks, fitted.bounded) if self.holds_out else fitted
        for place, x in zip(windows, inputs, strict=True):
            (judged if is_held_out(place) else fitted).add(x)
        found = fitted.statistics(linear.name)
        if not self.holds_out:
            return found
        return replace(found, held_out_II=judged.statistics(linear.name).second_moment_II)


class _BlockRun:
    """Applies the linears of a block; each quantized weight is unpacked once, not for every window."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.dense: dict[str, Tensor] = {}

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        name = linear.weight.name
        weight = self.weights[name]
        if name not in self.dense:
            self.dense[name] = densify(weight)
        if isinstance(weight, QuantizedWeight) and weight.scheme.activation_bits == 8:
            x = round_rows(x)
        bias = self.weights[f"{linear.name}.bias"] if linear.bias else None
        assert not isinstance(bias, QuantizedWeight)
        return torch.nn.functional.linear(x, self.dense[name], bias)


def densify(weight: Tensor | QuantizedWeight) -> Tensor:
    """A weight as floats."""
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
