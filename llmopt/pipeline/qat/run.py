"""Quantization-aware training of a model whose parts a method has quantized."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmopt.artifact import Journal
from llmopt.engine.torch import TorchEngine
from llmopt.model.checkpoint import Tensors
from llmopt.model.spec import Block, ModelSpec
from llmopt.pipeline.calibration import Weights
from llmopt.pipeline.journal import Part
from llmopt.pipeline.qat.data import TrainingText, require_divisible
from llmopt.pipeline.qat.options import STEPS, QatOptions
from llmopt.pipeline.qat.parts import Trained, put_back, unchanged
from llmopt.pipeline.qat.student import Distillation, LearningBlock, Student, Teacher
from llmopt.pipeline.ranks import Ranks
from llmopt.progress import Progress
from llmopt.quantize.execute import Rounding
from llmopt.quantize.fake import FakeQuantizedWeight
from llmopt.quantize.grid import ScaleRule
from llmopt.quantize.weights import QuantizedWeight
from llmopt.train.checkpoint import Checkpoints
from llmopt.train.divided import divide, gathered
from llmopt.train.loop import Trainer
from llmopt.train.settings import Precision, Settings

# The rate of step sizes, a part of themselves, to that of latents, in codes; thin matrices have that of latents.
# Ten times as much follows the noise of the first windows: 12 steps at 0.006 doubled the loss of the reference model.
STEP_SHARE = 0.02
BETAS = (0.9, 0.99)
EPSILON = 1e-15  # gradients by single weights are that small
EVALUATIONS = 8
PATIENCE = 4
WARMUP_STEPS = 10
CHECKPOINT_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that training needs to know; `floats` gives a block before it was quantized, None if nobody knows."""

    spec: ModelSpec
    options: QatOptions
    text: TrainingText
    tensors: Tensors  # of the float model
    floats: Callable[[Block], Mapping[str, Tensor] | None]
    rule: ScaleRule
    rounding: Rounding
    ranks: Ranks
    seed: int
    progress: Progress
    journal: Journal | None
    name: str  # of the checkpoints in the journal
    seconds: Callable[[], float | None]  # that are left for it
    recompute: bool = False
    divided: bool = False  # among the processes: each has but a share of what learns

    def learning_block(self, block: Block, weights: Weights) -> LearningBlock:
        """A block that learns from where it is."""
        floats = self.floats(block)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + block.index)

        def learn(name: str, weight: QuantizedWeight) -> FakeQuantizedWeight:
            exact_OI = None if floats is None else floats[name]
            return FakeQuantizedWeight(weight, exact_OI, self.rule, self.options.lora_rank, generator)

        return LearningBlock(block, weights, learn, self.rounding)

    def settings(self, blocks: int = 1, left: int = 1) -> Settings:
        """Of the training loop; of one of so many runs that have the steps together, and so many the time from now."""
        seconds, steps = self.seconds(), self.options.steps
        if seconds is None and steps is None:
            steps = STEPS
        return Settings(
            steps=None if steps is None else -(-steps // blocks),
            seconds=None if seconds is None else seconds / left,
            precision=Precision(self.options.precision),
            warmup_steps=WARMUP_STEPS,
            patience=PATIENCE,
            evaluations=EVALUATIONS,
            checkpoint_seconds=CHECKPOINT_SECONDS,
        )

    def checkpoints(self, name: str) -> Checkpoints | None:
        """Those of one run; the first process alone has them."""
        return None if self.journal is None else Checkpoints(self.journal, name)


def train_whole(run: Run, embedding: Part, blocks: list[Part], head: Part) -> Trained:
    """Have all blocks learn together, towards the distribution of the float model's next token.

    Raises:
        UsageError: windows do not divide among the processes.
        DivergedError: a loss or a gradient is no number.
    """
    require_divisible(run.options.batch, run.ranks.size)
    learning = [_learning(run, block, part) for block, part in zip(run.spec.blocks, blocks, strict=True)]
    outer = embedding.weights | head.weights
    student = Student(run.spec, outer, learning, run.rounding, recompute=run.recompute or run.divided)
    # Where memory is short the float model is read again for windows that come for the first time.
    teacher = Teacher(TorchEngine(run.spec, run.tensors, keep=not run.divided))
    model = Distillation(student, teacher, run.options.cross_entropy)
    if run.divided:
        divide(model)

    trainer = Trainer(
        model,
        [optimizer(learned_by(learning), run.options.rate)],
        partial(run.text.batches, windows=run.options.batch, ranks=run.ranks.size, seed=run.seed),
        run.settings(),
        evaluate=partial(mean_loss, model, run.text.held_out()),
        checkpoints=run.checkpoints(run.name),
        replicas=run.ranks,
        progress=run.progress,
    )
    outcome = trainer.run("training")
    for block, part, module in zip(run.spec.blocks, blocks, learning, strict=True):
        if outcome.best_step:
            with gathered(module):
                put_back(block, part, module.learned(), run.floats(block))
        else:
            unchanged(part)
    return Trained(outcomes=(outcome,))


def _learning(run: Run, block: Block, part: Part) -> LearningBlock:
    module = run.learning_block(block, part.weights)
    if run.divided:
        divide(module)
    return module


def mean_loss(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """The mean over windows, of batches of them."""
    return sum(float(model(ids_BT)) * len(ids_BT) for ids_BT in batches) / sum(map(len, batches))


def learned_by(blocks: Sequence[LearningBlock]) -> Sequence[FakeQuantizedWeight]:
    """Every weight that learns."""
    return [weight for block in blocks for weight in block.learned().values()]


def optimizer(weights: Sequence[FakeQuantizedWeight], rate: float) -> torch.optim.Optimizer:
    """Adam, with a rate for each kind of parameter."""
    rates = {"latent_OGS": rate, "ratio_OG1": STEP_SHARE * rate, "read_RI": rate, "write_OR": rate}
    named = [(name, parameter) for weight in weights for name, parameter in weight.named_parameters()]
    groups = [
        {"params": [parameter for other, parameter in named if other == name], "lr": rate}
        for name, rate in rates.items()
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)
