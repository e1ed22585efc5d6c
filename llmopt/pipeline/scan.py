"""What a cast has to know of a model: ranges of weights and activations on text, block by block.

The windows go through the float model as it is, one block in memory at a time. Each linear computes twice, once in
float32 and once with everything in 16 bits, so that what it would lose is measured and not guessed.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llmopt.engine.base import TokenIds
from llmopt.engine.blocks import (
    RotaryTables,
    Weights,
    attend,
    embed,
    feed_forward,
    head_inputs,
    in_own_dtype,
    normalize,
)
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.source import ModelSource
from llmopt.model.spec import Block, Linear, ModelSpec, Norm
from llmopt.pipeline.calibration import Weights as PartWeights
from llmopt.pipeline.calibration import densify
from llmopt.pipeline.finite import require_finite
from llmopt.pipeline.formats.cast import unassigned
from llmopt.pipeline.parts import PartReader
from llmopt.pipeline.spill import States, limit_bytes
from llmopt.precision.cast import Ranges, Seen, see_weight
from llmopt.progress import Progress

RANGES = "ranges.json"  # in a journal
TINY = torch.finfo(torch.float32).tiny


def scan(
    source: ModelSource, windows: Sequence[TokenIds], dtype: torch.dtype, folder: Path, progress: Progress
) -> Ranges:
    """What text shows of every module; hidden states that memory has no room for lie in `folder`.

    Raises:
        LlmoptError: the weights are damaged, or the model overflows float32.
    """
    spec = source.spec
    with open_checkpoint(source) as checkpoint:
        parts = PartReader(spec, checkpoint, unassigned(spec), None)
        return Scan(spec, windows, dtype, partial(States, limit_bytes(), folder)).run(parts, progress)


@dataclass
class _Watched:
    """One module while windows pass through it."""

    weights: Seen
    largest_input: float = 0.0
    largest_output: float = 0.0
    squared_error: float = 0.0
    tokens: int = 0

    def seen(self) -> Seen:
        error = (self.squared_error / self.tokens) ** 0.5 if self.tokens else 0.0
        return dataclasses.replace(
            self.weights,
            largest_input=self.largest_input,
            largest_output=self.largest_output,
            error=math.inf if math.isnan(error) else error,
        )


@dataclass
class Scan:
    """Text on its way through a model: `run` it once, over the parts that a reader gives.

    Raises:
        ModelError: the model itself overflows float32.
    """

    spec: ModelSpec
    windows: Sequence[TokenIds]
    dtype: torch.dtype
    states: Callable[[], States] = States
    watched: dict[str, _Watched] = field(default_factory=dict, init=False)

    @torch.inference_mode()
    def run(self, parts: PartReader, progress: Progress) -> Ranges:
        """Read the model part by part, and see."""
        spec = self.spec
        tables = RotaryTables(spec, max(map(len, self.windows)))
        with progress.task("scanning ranges", total=len(spec.blocks) + 2) as task:
            embedding = parts.embedding()
            embedded = self._embedding(_floats(embedding.weights))
            task.advance(note="embedding done")
            residual = []
            for block, part in zip(spec.blocks, parts.blocks(), strict=True):
                residual.append(self._block(block, _floats(part.weights), tables))
                task.advance(note=f"block {block.index + 1} of {len(spec.blocks)} done")
            self._head(_floats(parts.head(embedding).weights))
            task.advance(note="head done")
        return Ranges(
            modules={name: watched.seen() for name, watched in self.watched.items()},
            embedded=embedded,
            residual=residual,
        )

    def _embedding(self, weights: Weights) -> float:
        self.hidden, largest = self.states(), 0.0
        tables = [weights[tensor.name] for tensor in self.spec.embedding.tensors()]
        found = [see_weight(table, self.dtype) for table in tables]
        worst = {each.name: max(getattr(one, each.name) for one in found) for each in dataclasses.fields(Seen)}
        self.watched[self.spec.embedding.name] = _Watched(Seen(**worst))
        for ids_T in self.windows:
            hidden = embed(self.spec.embedding, weights, torch.from_numpy(ids_T)[None])
            largest = max(largest, _largest(hidden))
            self.hidden.append(hidden)
        return largest

    def _block(self, block: Block, weights: Weights, tables: RotaryTables) -> tuple[float, float]:
        """Gives the largest magnitude of the residual stream behind attention, and behind the block."""
        apply = self._watching(weights, list(block.linears()))
        for norm in block.norms():
            self._watch_weights(norm.name, weights)
        after_attention = after_mlp = 0.0
        for index, entering in enumerate(self.hidden):
            x = self._normed(block.attention_norm, weights, entering)
            branch = attend(block.attention, weights, x, tables.turn(block, 0, x.shape[1]), apply=apply)
            between = entering + self._post(block.attention_post_norm, weights, branch)
            branch = feed_forward(block.mlp, self._normed(block.mlp_norm, weights, between), apply)
            leaving = between + self._post(block.mlp_post_norm, weights, branch)
            require_finite(leaving, f"behind block {block.index}")
            after_attention = max(after_attention, _largest(between))
            after_mlp = max(after_mlp, _largest(leaving))
            self.hidden[index] = leaving
        return after_attention, after_mlp

    def _head(self, weights: Weights) -> None:
        apply = self._watching(weights, [self.spec.head])
        self._watch_weights(self.spec.final_norm.name, weights)
        final = self.watched[self.spec.final_norm.name]
        for hidden in self.hidden:
            x = head_inputs(self.spec, weights, hidden)
            final.largest_output = max(final.largest_output, _largest(x))
            apply(self.spec.head, x)

    def _watch_weights(self, name: str, weights: Weights) -> None:
        """Of a bias the largest magnitude counts alone: what is lost of it shows in what its linear gives."""
        seen = see_weight(weights[f"{name}.weight"], self.dtype)
        bias = weights.get(f"{name}.bias")
        if bias is not None:
            seen = dataclasses.replace(seen, largest_weight=max(seen.largest_weight, _largest(bias)))
        self.watched[name] = _Watched(seen)

    def _normed(self, norm: Norm, weights: Weights, x: Tensor) -> Tensor:
        y = normalize(norm, weights, x)
        watched = self.watched[norm.name]
        watched.largest_output = max(watched.largest_output, _largest(y))
        return y

    def _post(self, norm: Norm | None, weights: Weights, branch: Tensor) -> Tensor:
        return branch if norm is None else self._normed(norm, weights, branch)

    def _watching(self, weights: Weights, linears: Sequence[Linear]) -> Callable[[Linear, Tensor], Tensor]:
        """Linears in float32, held against what 16 bits give."""
        exact, short = in_own_dtype(weights), in_own_dtype(_short(weights, linears, self.dtype))
        for linear in linears:
            seen = see_weight(weights[linear.weight.name], self.dtype)
            if linear.bias:
                bias = _largest(weights[f"{linear.name}.bias"])
                seen = dataclasses.replace(seen, largest_weight=max(seen.largest_weight, bias))
            self.watched[linear.name] = _Watched(seen)

        def apply(linear: Linear, x: Tensor) -> Tensor:
            y, watched = exact(linear, x), self.watched[linear.name]
            lost_N = (short(linear, x).float() - y).square().sum(-1)
            watched.squared_error += float((lost_N / y.square().sum(-1).clamp_min(TINY)).sum())
            watched.tokens += lost_N.numel()
            watched.largest_input = max(watched.largest_input, _largest(x))
            watched.largest_output = max(watched.largest_output, _largest(y))
            return y

        return apply


def ranges_to_bytes(ranges: Ranges) -> bytes:
    """As a journal keeps them."""
    return json.dumps(dataclasses.asdict(ranges)).encode()


def ranges_from_bytes(data: bytes) -> Ranges:
    """What `ranges_to_bytes` was given."""
    found = json.loads(data)
    return Ranges(
        modules={name: Seen(**seen) for name, seen in found["modules"].items()},
        embedded=found["embedded"],
        residual=[(first, second) for first, second in found["residual"]],
    )


def _short(weights: Weights, linears: Sequence[Linear], dtype: torch.dtype) -> Mapping[str, Tensor]:
    names = [linear.weight.name for linear in linears]
    names += [f"{linear.name}.bias" for linear in linears if linear.bias]
    return {name: weights[name].to(dtype) for name in names}


def _floats(weights: PartWeights) -> dict[str, Tensor]:
    return {name: densify(weight) for name, weight in weights.items()}


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
