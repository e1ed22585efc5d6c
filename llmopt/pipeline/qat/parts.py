"""A model's parts as they are once they have learnt: what a method has quantized is trained, and handed on in order."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from llmopt.model.spec import Block, ModelSpec
from llmopt.pipeline.journal import Part
from llmopt.progress import Progress
from llmopt.quantize.fake import FakeQuantizedWeight
from llmopt.quantize.registry import JOIN, TRAINED
from llmopt.quantize.weights import QuantizedWeight
from llmopt.train.state import Outcome

NO_GAIN = "training was no gain on held-out text"


class Parts(Protocol):
    """The model, embedding first and head last."""

    def embedding(self) -> Part:
        """The token table, and learned positions."""
        ...

    def blocks(self) -> Iterator[Part]:
        """Each block."""
        ...

    def head(self, embedding: Part) -> Part:
        """The final norm and the head."""
        ...


# Trains the quantized weights of all blocks in place; beside the blocks are embedding and head.
Train = Callable[[Part, list[Part], Part], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Runs of the training loop, one for the whole model or one a block, and what they began and ended with."""

    outcomes: tuple[Outcome, ...]

    def to_json(self) -> dict[str, Any]:
        """What a report says of it. Losses are those on held-out text, in nats a token where the whole model learnt."""
        peaks = [outcome.peak_rss_bytes for outcome in self.outcomes if outcome.peak_rss_bytes is not None]
        return {
            "trained_steps": self.steps,
            "trained_tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens / self.seconds if self.seconds else None,
            "peak_rss_bytes": max(peaks, default=None),
            "held_out": [[asdict(one) for one in outcome.evaluations] for outcome in self.outcomes],
            "best_steps": [outcome.best_step for outcome in self.outcomes],
        }

    def notes(self) -> list[str]:
        """In words."""
        if not self.outcomes:
            return ["there was no time to train: what was quantized is what was written"]
        took = f"trained for {self.steps:,} steps, {self.tokens:,} tokens in {self.seconds / 60:.1f} minutes"
        pace = f"{took}: {self.tokens / max(self.seconds, 1e-9):,.0f} tokens a second"
        if len(self.outcomes) > 1:
            better = sum(outcome.best_step > 0 for outcome in self.outcomes)
            return [pace, f"{better} of {len(self.outcomes)} blocks are nearer to the float ones on held-out text"]
        (outcome,) = self.outcomes
        before, best = outcome.loss_at(0), outcome.loss_at(outcome.best_step)
        assert before is not None
        assert best is not None
        return [
            pace,
            f"the loss on held-out text was {before:.4f} before, and is {best:.4f} of step {outcome.best_step}",
        ]

    @property
    def steps(self) -> int:
        """Of all runs."""
        return sum(outcome.steps for outcome in self.outcomes)

    @property
    def tokens(self) -> int:
        """That were learnt from."""
        return sum(outcome.tokens for outcome in self.outcomes)

    @property
    def seconds(self) -> float:
        """Evaluation included."""
        return sum(outcome.seconds for outcome in self.outcomes)


class TrainedParts:
    """The parts of `inner`, trained before the first is handed on, for they learn together."""

    def __init__(self, spec: ModelSpec, inner: Parts, train: Train, progress: Progress) -> None:
        self.spec = spec
        self.inner = inner
        self.train = train
        self.progress = progress
        self._blocks: list[Part] = []
        self._head: Part | None = None

    def embedding(self) -> Part:
        """Quantize and train everything, and give the first part."""
        embedding = self.inner.embedding()
        with self.progress.task("quantizing, to train from there", total=len(self.spec.blocks)) as task:
            for block, part in zip(self.spec.blocks, self.inner.blocks(), strict=True):
                self._blocks.append(part)
                task.advance(note=f"block {block.index + 1} of {len(self.spec.blocks)} done")
        self._head = self.inner.head(embedding)
        self.train(embedding, self._blocks, self._head)
        return embedding

    def blocks(self) -> Iterator[Part]:
        """Each block."""
        while self._blocks:
            yield self._blocks.pop(0)

    def head(self, embedding: Part) -> Part:
        """The final norm and the head."""
        assert self._head is not None
        return self._head


def put_back(
    block: Block, part: Part, learned: Mapping[str, FakeQuantizedWeight], floats: Mapping[str, Tensor] | None
) -> None:
    """Put what weights have become among those of a part; `floats` None: nobody knows what they were rounded from."""
    part.weights.update({name: weight.quantized() for name, weight in learned.items()})
    linears = {linear.name: linear.weight.name for linear in block.linears()}
    for index, layer in enumerate(part.layers):
        name = linears[layer.name]
        weight = part.weights[name]
        if name in learned and isinstance(weight, QuantizedWeight):
            error = None if floats is None else weight.relative_error(floats[name])
            part.layers[index] = replace(layer, method=f"{layer.method}{JOIN}{TRAINED}", relative_error=error)


def unchanged(part: Part, why: str = NO_GAIN) -> None:
    """Say of the layers of a part that they are as they were before."""
    for index, layer in enumerate(part.layers):
        if layer.scheme is not None:
            reason = "; ".join(filter(None, (layer.reason, why)))
            part.layers[index] = replace(layer, reason=reason)
