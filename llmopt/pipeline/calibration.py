"""One pass of text through the model, block by block, in which every linear sees the inputs that it will have.

The hidden states of all windows go through a block in four steps, one for each group of linears that share an input.
Before a group is quantized, what enters it is summed up; behind it, the windows go on through the quantized weights, so
each layer is fitted to what the layers before it really give. One block is in memory, and as much of the hidden states
as `States` keeps there.

Of several processes each has some of the windows, and they add up what they find.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from llmopt.calibrate.text import Corpus
from llmopt.calibrate.windows import windows
from llmopt.engine.base import TokenIds
from llmopt.engine.blocks import Apply, RotaryTables, activated, block_forward, embed, head_inputs, mixed, normalize
from llmopt.errors import LlmoptError, UsageError
from llmopt.model.rotary import longest_sequence
from llmopt.model.spec import Block, Linear, ModelSpec, Norm, TensorSpec
from llmopt.model.tokenizer import Tokenizer
from llmopt.pipeline.finite import OVERFLOW_HINT
from llmopt.pipeline.ranks import ALONE, Ranks
from llmopt.pipeline.spill import States
from llmopt.quantize.execute import round_rows
from llmopt.quantize.fold import InputSample
from llmopt.quantize.method import InputStatistics
from llmopt.quantize.weights import QuantizedWeight

Weights = dict[str, Tensor | QuantizedWeight]
# Quantizes some linears that share their input, whose statistics these are, and puts them among the weights.
QuantizeGroup = Callable[[Sequence[Linear], InputStatistics], None]


CALIBRATION_TOKENS = 64 * 512
WINDOW = 512
PANELS, MIN_PANEL = 4, 64
KEPT_BYTES = 2**28  # of what enters the widest products; more is computed twice
SAMPLED_TOKENS = 512
HEAD_TOKENS = 8192
TINY = torch.finfo(torch.float32).tiny
HELD_OUT = 8  # of so many windows the first is not fitted to, where something is to be judged
CONTEXT = 8  # tokens by which a token and those before it are told from others


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """What is calibrated on: at most `tokens` tokens of a text."""

    corpus: Corpus
    tokens: int

    def entry(self) -> dict[str, str | int]:
        """As manifests and reports name it."""
        return {"text": self.corpus.name, "sha256": self.corpus.sha256, "tokens": self.tokens, "window": WINDOW}

    def windows(self, spec: ModelSpec, tokenizer: Tokenizer) -> list[TokenIds]:
        """The text in the model's tokens."""
        found = windows(self.corpus, tokenizer, min(WINDOW, longest_sequence(spec)), self.tokens)
        # A tokenizer may know more tokens than the model has rows.
        return [np.minimum(ids, spec.vocab_size - 1) for ids in found.ids]


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


def is_held_out(place: int) -> bool:
    """Whether the window at some place among all is one that nothing is fitted to, where something is to be judged."""
    return place % HELD_OUT == 0


def require_tokens(
    spec: ModelSpec, windows: Sequence[TokenIds], ranks: Ranks = ALONE, *, holds_out: bool = False
) -> int:
    """See that there are as many tokens that are not just repeated as the widest linear has inputs, and a window for
    each process.

    Gives how many tokens there are, with those that are held out, which do not count for this.

    Raises:
        UsageError: there are fewer, which would leave its second moment singular, or a process without work.
    """
    if len(windows) < ranks.size:
        raise UsageError(
            f"{len(windows)} windows to calibrate on, and {ranks.size} processes to divide them among",
            hint="start fewer processes, or give more text with --calib-tokens or --calib",
        )
    fitted = [ids for index, ids in enumerate(windows) if not (holds_out and is_held_out(index))]
    tokens = sum(map(len, fitted))
    widest = max(spec.linears(), key=lambda linear: linear.in_features)
    if tokens < widest.in_features:
        raise UsageError(
            f"{tokens} tokens to calibrate on{', beside those held out' * holds_out}, and {widest.name} has "
            f"{widest.in_features} inputs",
            hint="give more text with --calib, or more of it with --calib-tokens",
        )
    different = different_tokens(fitted)
    if different < widest.in_features:
        raise UsageError(
            f"the text to calibrate on repeats itself: of its {tokens} tokens {different} differ, in themselves or in "
            f"the {CONTEXT - 1} before them, and {widest.name} has {widest.in_features} inputs",
            hint="give text like what the model will read with --calib",
        )
    return sum(map(len, windows))


def different_tokens(windows: Sequence[TokenIds]) -> int:
    """How many tokens differ, in themselves or in those before them: repeated ones put the same into a linear again."""
    contexts = [np.lib.stride_tricks.sliding_window_view(np.pad(ids, (CONTEXT - 1, 0)), CONTEXT) for ids in windows]
    return len(np.unique(np.concatenate(contexts), axis=0))


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
