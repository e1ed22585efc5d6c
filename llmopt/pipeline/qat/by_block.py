"""Training one block at a time, for models that do not fit into memory as a whole.

Each block learns, from what really enters it, to leave its hidden states as near those of the float model as it can.
One block is in memory, and the hidden states of all windows, before it and as the float model has them.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from llmopt.engine.blocks import RotaryTables, Turn, block_forward, embed
from llmopt.model.spec import Block, Linear
from llmopt.pipeline.calibration import densify
from llmopt.pipeline.journal import Part
from llmopt.pipeline.qat.data import require_divisible
from llmopt.pipeline.qat.parts import Trained, put_back, unchanged
from llmopt.pipeline.qat.run import Run, learned_by, mean_loss, optimizer
from llmopt.pipeline.qat.student import LearningBlock
from llmopt.pipeline.reconstruct import block_error
from llmopt.pipeline.spill import States
from llmopt.train.loop import Trainer


class BlockLoss(nn.Module):
    """How far a block is from the float one on some windows, as the training loop asks for it."""

    def __init__(
        self, module: LearningBlock, entering: States, exact: States, places: Mapping[bytes, int], turn: Turn | None
    ) -> None:
        super().__init__()
        self.module = module
        self.entering = entering
        self.exact = exact
        self.places = places
        self.turn = turn

    def forward(self, ids_BT: Tensor) -> Tensor:
        """The mean over windows of the error, as a part of what there is."""
        places = [self.places[ids_T.numpy().tobytes()] for ids_T in ids_BT]
        found_BTH = self.module(torch.cat([self.entering[place] for place in places]), self.turn)
        exact_BTH = torch.cat([self.exact[place] for place in places])
        return torch.stack([block_error(*pair) for pair in zip(found_BTH, exact_BTH, strict=True)]).mean()


def train_by_block(run: Run, states: Callable[[], States], embedding: Part, blocks: list[Part]) -> Trained:
    """Have each block learn by itself; `states` makes lists for hidden states.

    Raises:
        UsageError: windows do not divide among the processes.
        DivergedError: a loss or a gradient is no number.
    """
    require_divisible(run.options.batch, run.ranks.size)
    ids_NT = torch.cat([run.text.learnt_NT, run.text.held_out_NT])
    places = {ids_T.numpy().tobytes(): place for place, ids_T in enumerate(ids_NT)}
    spec, tables = run.spec, RotaryTables(run.spec, ids_NT.shape[1])
    stored = {tensor.name: run.tensors.read(tensor) for tensor in spec.embedding.tensors()}
    table = {name: densify(weight) for name, weight in embedding.weights.items()}
    entering, exact = states(), states()
    with torch.no_grad():
        entering.extend(embed(spec.embedding, table, ids_T[None]) for ids_T in ids_NT)
        exact.extend(embed(spec.embedding, stored, ids_T[None]) for ids_T in ids_NT)
    outcomes = []
    for block, part in zip(spec.blocks, blocks, strict=True):
        turn = tables.turn(block, 0, ids_NT.shape[1])
        floats = run.floats(block) or _stored(run, block)
        _follow(block, floats, exact, turn)
        loss = BlockLoss(run.learning_block(block, part.weights), entering, exact, places, turn)
        trainer = Trainer(
            loss,
            [optimizer(learned_by([loss.module]), run.options.rate)],
            partial(run.text.batches, windows=run.options.batch, ranks=run.ranks.size, seed=run.seed + block.index),
            run.settings(blocks=len(spec.blocks), left=len(spec.blocks) - block.index),
            evaluate=partial(mean_loss, loss, run.text.held_out()),
            checkpoints=run.checkpoints(f"{run.name}-block-{block.index}"),
            replicas=run.ranks,
            progress=run.progress,
        )
        outcomes.append(trainer.run(f"training block {block.index + 1} of {len(spec.blocks)}"))
        if outcomes[-1].best_step:
            put_back(block, part, loss.module.learned(), run.floats(block))
        else:
            unchanged(part)
        with torch.no_grad():
            for place, hidden_1TH in enumerate(entering):
                entering[place] = loss.module(hidden_1TH, turn)
    return Trained(outcomes=tuple(outcomes))


def _stored(run: Run, block: Block) -> dict[str, Tensor]:
    """A block of the float model; linears as [out, in]."""
    floats = {tensor.name: run.tensors.read(tensor) for tensor in block.tensors()}
    for linear in block.linears():
        if linear.transposed:
            floats[linear.weight.name] = floats[linear.weight.name].T.contiguous()
    return floats


@torch.no_grad()
def _follow(block: Block, floats: Mapping[str, Tensor], exact: States, turn: Turn | None) -> None:
    """Take the float model's states through a block."""

    def apply(linear: Linear, x: Tensor) -> Tensor:
        bias = floats[f"{linear.name}.bias"] if linear.bias else None
        return nn.functional.linear(x, floats[linear.weight.name], bias)

    for place, hidden_1TH in enumerate(exact):
        exact[place] = block_forward(block, floats, hidden_1TH, turn, apply=apply)
