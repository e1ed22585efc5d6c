"""Does the exported graph compute what the quantized model computes? Tokens run through both, and a mismatch fails.

The reference runs in torch while the parts pass by, so it costs one block of memory. With activations in float32 both
sides must agree to rounding. Integer products round activations, which is chaotic: a value halfway between two codes
falls either way, and all that follows moves with it. So with them the error may be as large as that of rounding in
torch, but not larger. Last the graph runs as it ships, and how far it is from float32 activations is reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmopt.engine.base import Logits, TokenIds
from llmopt.engine.blocks import RotaryTables, block_forward, embed, head_logits
from llmopt.engine.ort import LOGITS_AT, OrtEngine
from llmopt.engine.segments import run_in_segments
from llmopt.errors import VerificationError
from llmopt.export.onnx.graph import GRAPH_FILE
from llmopt.export.onnx.levels import in_float32
from llmopt.measure.tokens import score
from llmopt.model.spec import Block, ModelSpec
from llmopt.pipeline.calibration import Weights
from llmopt.pipeline.finite import require_finite
from llmopt.progress import Progress
from llmopt.quantize.execute import Rounding, quantized_apply, round_rows
from llmopt.quantize.weights import QuantizedWeight

# Relative error of the logits, ‖Δ‖ / ‖logits‖. Float32 on both sides differs by about 1e-6, a wrong graph by 0.1.
FLOAT_TOLERANCE = 1e-3
# Two roundings of the same activations leave errors of the same size, but not the same errors.
ROUNDING_FACTOR = 2.0
# Fed one by one, tokens meet other kernels, which round as much but not alike.
STEPS = 16
_REPORT = "this is a defect of llmopt or of the program that opened it: please report it with this message"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Two computations of the same logits: relative error, share of equal most likely tokens, mean KL in nats."""

    relative_error: float
    top1_agreement: float
    kl_divergence: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """What the kernels' int8 activations cost, where they flip more than a few tokens; see `llmopt.pipeline.repair`.

    `flipped` is the share of tokens that had another most likely successor, `largest_error` that of the worst product,
    and `unrounded` holds the products, and their errors, that were given another kernel for it.
    """

    flipped: float
    largest_error: float
    unrounded: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Held against the quantized model in torch with float32 activations.

    `exact` is the graph with float32 activations too, `shipped` the graph as it is (None where the engine that opens it
    was not run), and `rounded` the model in torch with activations rounded, where the scheme says so.
    """

    exact: Agreement
    shipped: Agreement | None
    rounded: Agreement | None
    activations: Activations | None = None


class ComputesLogits(Protocol):
    """As much of an engine as is needed here."""

    def logits(self, ids_BT: TokenIds) -> Logits:
        """Logits at every position, [batch, tokens, vocab_size]."""
        ...


class Reference:
    """The quantized model's hidden states, carried along as the parts come by."""

    def __init__(
        self, spec: ModelSpec, windows: list[TokenIds], *, round_activations: bool, rounding: Rounding = round_rows
    ) -> None:
        self.spec = spec
        self.windows = windows
        self.round_activations = round_activations
        self.rounding = rounding
        self.tables = RotaryTables(spec, max(len(ids) for ids in windows))
        self.hidden: list[Tensor] = []
        self.head_weights: Weights = {}

    @torch.inference_mode()
    def embedding(self, weights: Weights) -> None:
        """Look the tokens up in the table as it is stored."""
        plain = {
            name: weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
            for name, weight in weights.items()
        }
        self.hidden = [embed(self.spec.embedding, plain, torch.from_numpy(ids)[None]) for ids in self.windows]

    @torch.inference_mode()
    def block(self, block: Block, weights: Weights) -> None:
        """Run one block.

        Raises:
            ModelError: what comes out of it is not finite.
        """
        for index, hidden in enumerate(self.hidden):
            turn = self.tables.turn(block, 0, hidden.shape[1])
            self.hidden[index] = block_forward(block, floats(weights), hidden, turn, apply=self._apply(weights))
            require_finite(self.hidden[index], f"behind block {block.index}")

    def head(self, weights: Weights) -> None:
        """Keep what `logits` needs."""
        self.head_weights = weights

    @torch.inference_mode()
    def logits(self, index: int) -> NDArray[np.float32]:
        """Logits of one window, [tokens, vocab_size].

        Raises:
            ModelError: they are not finite.
        """
        weights = self.head_weights
        logits = head_logits(self.spec, floats(weights), self.hidden[index], apply=self._apply(weights))[0]
        require_finite(logits, self.spec.head.name)
        found: NDArray[np.float32] = logits.numpy()
        return found

    def _apply(self, weights: Weights) -> "partial[Tensor]":
        return partial(quantized_apply, weights, round_activations=self.round_activations, rounding=self.rounding)


def floats(weights: Weights) -> dict[str, Tensor]:
    """Those tensors that are not quantized, norms among them."""
    return {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}


def verify(folder: Path, exact: Reference, rounded: Reference | None, threads: int, progress: Progress) -> Verification:
    """Hold the graph in `folder` against the references; `rounded` is None where no scheme rounds activations.

    Raises:
        VerificationError: it computes something else.
    """
    with progress.task("comparing the graph with the model in torch", total=2 if rounded is None else 3) as task:
        agreement = compare_rewritten(folder, exact, threads, integers=False)
        require(agreement, FLOAT_TOLERANCE, "in float32")
        task.advance()
        in_torch = None
        if rounded is not None:
            in_torch = agree([(exact.logits(index), rounded.logits(index)) for index in range(len(exact.windows))])
            integers = compare_rewritten(folder, exact, threads, integers=True)
            bound = ROUNDING_FACTOR * in_torch.relative_error + FLOAT_TOLERANCE
            require(integers, bound, "with integer products")
            task.advance()
        engine = OrtEngine(folder, threads)
        shipped = compare(engine, exact)
        bound = ROUNDING_FACTOR * shipped.relative_error + FLOAT_TOLERANCE
        require(compare_steps(engine, exact), bound, "fed one token at a time")
        task.advance()
    return Verification(exact=agreement, shipped=shipped, rounded=in_torch)


def compare_rewritten(folder: Path, reference: Reference, threads: int, *, integers: bool) -> Agreement:
    """The graph rewritten to float32 activations, or to those that integer products need, against the reference."""
    model = onnx.load(folder / GRAPH_FILE, load_external_data=False)
    feeds = [whole_sequence(reference.spec, ids) for ids in reference.windows]
    # In segments: with the integer weights of the whole model as floats it would take four times its size.
    logits = run_in_segments(in_float32(model, integers=integers), folder, feeds, "logits", threads)
    return agree([(reference.logits(index), actual[0]) for index, actual in enumerate(logits)])


def whole_sequence(spec: ModelSpec, ids_T: TokenIds) -> dict[str, NDArray[Any]]:
    """What a graph is fed to give the logits of all these tokens."""
    attention = spec.blocks[0].attention
    empty = np.zeros((1, attention.kv_heads, 0, attention.head_dim), np.float32)
    pasts = [f"past_key_values.{index}.{kind}" for index in range(len(spec.blocks)) for kind in ("key", "value")]
    sequence = {"input_ids": ids_T[None], "attention_mask": np.ones((1, len(ids_T)), np.int64)}
    return dict.fromkeys(pasts, empty) | sequence | {LOGITS_AT: np.arange(len(ids_T))}


def require(agreement: Agreement, tolerance: float, how: str) -> None:
    """Refuse an error above the tolerance, or one that is not a number.

    Raises:
        VerificationError: it is.
    """
    if not agreement.relative_error <= tolerance:
        raise VerificationError(
            f"{how}, the exported model's logits differ from the quantized model's by {agreement.relative_error:.2g} "
            f"(relative; {tolerance:.2g} is allowed), top-1 agreement {agreement.top1_agreement:.2%}",
            hint=_REPORT,
        )


def compare(engine: ComputesLogits, reference: Reference) -> Agreement:
    """An engine's logits against the reference's."""
    windows = enumerate(reference.windows)
    return agree([(reference.logits(index), engine.logits(ids[None])[0]) for index, ids in windows])


def compare_steps(engine: OrtEngine, reference: Reference) -> Agreement:
    """The first tokens of a window, fed one by one, against the reference's logits."""
    ids_T = reference.windows[0][:STEPS]
    stream = engine.stream(len(ids_T))
    found = np.stack([stream.feed(ids_T[place : place + 1]) for place in range(len(ids_T))])
    return agree([(reference.logits(0)[: len(ids_T)], found)])


def agree(pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Agreement:
    """Pairs of expected and actual logits, [tokens, vocab_size] each."""
    squared_error = squared_norm = kl = agreeing = 0.0
    tokens = sum(len(expected) for expected, _ in pairs)
    for expected, actual in pairs:
        squared_error += float(np.square(actual - expected, dtype=np.float64).sum())
        squared_norm += float(np.square(expected, dtype=np.float64).sum())
        scores = score(expected, actual, np.zeros(len(expected), np.int64))
        kl += float(scores.kl.sum())
        agreeing += float(scores.agree.sum())
    return Agreement(
        relative_error=(squared_error / squared_norm if squared_norm else squared_error) ** 0.5,
        top1_agreement=agreeing / tokens,
        kl_divergence=max(0.0, kl / tokens),  # a rounding error may make it a hair negative
        tokens=tokens,
    )


class References:
    """Every reference that an export needs, fed together."""

    def __init__(
        self, spec: ModelSpec, windows: list[TokenIds], *, rounds_activations: bool, rounding: Rounding = round_rows
    ) -> None:
        self.exact = Reference(spec, windows, round_activations=False)
        self.rounded = None
        if rounds_activations:
            self.rounded = Reference(spec, windows, round_activations=True, rounding=rounding)
        self.all = [self.exact, *([self.rounded] if self.rounded is not None else [])]

    def embedding(self, weights: Weights) -> None:
        """See `Reference`."""
        for reference in self.all:
            reference.embedding(weights)

    def block(self, block: Block, weights: Weights) -> None:
        """See `Reference`."""
        for reference in self.all:
            reference.block(block, weights)

    def head(self, weights: Weights) -> None:
        """See `Reference`."""
        for reference in self.all:
            reference.head(weights)
