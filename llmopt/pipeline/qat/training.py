"""What is to be trained and on what, and the parts of a model that does so."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from llmopt.calibrate.text import Corpus
from llmopt.model.spec import Block
from llmopt.model.tokenizer import Tokenizer
from llmopt.pipeline.journal import Part, PartJournal
from llmopt.pipeline.pace import Pace
from llmopt.pipeline.parts import PartReader
from llmopt.pipeline.qat.by_block import train_by_block
from llmopt.pipeline.qat.data import training_text
from llmopt.pipeline.qat.options import QatOptions
from llmopt.pipeline.qat.parts import Trained, TrainedParts, unchanged
from llmopt.pipeline.qat.run import Run, train_whole
from llmopt.pipeline.spill import States
from llmopt.progress import Progress
from llmopt.quantize.execute import Rounding

NO_TIME = "no time to train"


@dataclass(slots=True, kw_only=True)
class Training:
    """What to train on, and how; `trained` is what became of it, once it is done.

    `divided`: each process has a share of what learns, not all of it.
    """

    options: QatOptions
    corpus: Corpus
    recompute: bool = False
    divided: bool = False
    trained: Trained | None = None

    def entry(self) -> Mapping[str, str | bool | int | float | None]:
        """As manifests and reports name it."""
        return {"text": self.corpus.name, "sha256": self.corpus.sha256, **self.options.entry()}


def trained_parts(
    training: Training,
    parts: PartReader,
    tokenizer: Tokenizer,
    rounding: Rounding,
    *,
    states: Callable[[], States],
    journal: PartJournal | None,
    pace: Pace,
    seed: int,
    progress: Progress,
) -> TrainedParts:
    """The parts of a model as they are once they have learnt."""
    assert parts.method is not None

    def seconds() -> float | None:
        return None if pace.minutes is None else pace.ends - pace.clock()

    run = Run(
        spec=parts.spec,
        options=training.options,
        text=training_text(training.corpus, parts.spec, tokenizer),
        tensors=parts.checkpoint,
        floats=partial(_floats, parts),
        rule=parts.method.scales,
        rounding=rounding,
        ranks=parts.ranks,
        seed=seed,
        progress=progress,
        journal=None if journal is None else journal.journal,
        name="training" if journal is None else f"{journal.choice}-training",
        seconds=seconds,
        recompute=training.recompute,
        divided=training.divided,
    )

    def train(embedding: Part, blocks: list[Part], head: Part) -> None:
        left_s = run.ranks.of_first(seconds)
        if left_s is not None and left_s <= 0:
            for part in blocks:
                unchanged(part, NO_TIME)
            training.trained = Trained(outcomes=())
        elif run.options.by_block:
            training.trained = train_by_block(run, states, embedding, blocks)
        else:
            training.trained = train_whole(run, embedding, blocks, head)

    return TrainedParts(parts.spec, parts, train, progress)


def _floats(parts: PartReader, block: Block) -> Mapping[str, Tensor] | None:
    """A block as it was before it was quantized, linears as [out, in]; None if folds have changed it."""
    return None if parts.folds else parts.floats(block)
