"""What a run has come to: where it is, what it has seen, and what of that goes into a checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmopt.train.checkpoint import Snapshot, optimizer_tensors, restore_optimizer
from llmopt.train.divided import like

_MODEL, _BEST, _OPTIMIZER, _RANDOM = "model:", "best:", "optimizer:", "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The loss on held-out text behind a step, in nats a token where that is what the model gives."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a run. `losses` and `scales` are those of each step, `best_step` that of the weights as left."""

    steps: int
    tokens: int
    seconds: float
    best_step: int
    losses: tuple[float, ...]
    scales: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    peak_rss_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        """Evaluation included."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def loss_at(self, step: int) -> float | None:
        """On held-out text; None where it was not asked for."""
        return next((one.loss for one in self.evaluations if one.step == step), None)


@dataclass
class RunState:
    """Where a run is. `best` has the parameters for which the loss on held-out text was least, once that was asked."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # until the last checkpoint
    is_over: bool = False
    without_gain: int = 0  # evaluations since the best
    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def best_step(self) -> int:
        """The step behind which the loss on held-out text was least; without any, the last."""
        return min(self.evaluations, key=lambda one: one.loss).step if self.evaluations else self.step

    def evaluated(self, loss: float, model: nn.Module, patience: int | None) -> None:
        """Take a loss on held-out text."""
        best = min((one.loss for one in self.evaluations), default=math.inf)
        self.evaluations.append(Evaluation(step=self.step, loss=loss))
        if loss < best:
            self.without_gain = 0
            self.best = {name: parameter.detach().clone() for name, parameter in learning(model)}
            return
        self.without_gain += 1
        self.is_over = patience is not None and self.without_gain >= patience

    @torch.no_grad()
    def restore_best(self, model: nn.Module) -> None:
        """Leave the model at its best."""
        if self.best and self.best_step != self.step:
            for name, parameter in learning(model):
                parameter.copy_(self.best[name])
        self.best = {}

    def outcome(self, seconds: float, peak_bytes: int | None) -> Outcome:
        """What became of it."""
        return Outcome(
            steps=self.step,
            tokens=self.tokens,
            seconds=seconds,
            best_step=self.best_step,
            losses=tuple(self.losses),
            scales=tuple(self.scales),
            evaluations=tuple(self.evaluations),
            peak_rss_bytes=peak_bytes,
        )


def learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that learn, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def capture(
    model: nn.Module, optimizers: Sequence[Optimizer], scaler: torch.amp.GradScaler, state: RunState
) -> Snapshot:
    """All that a run goes on from; of one that is over, what it left."""
    tensors: dict[str, Tensor] = {_MODEL + name: parameter for name, parameter in learning(model)}
    tensors |= {_BEST + name: tensor for name, tensor in state.best.items()}
    if not state.is_over:
        for number, optimizer in enumerate(optimizers):
            tensors |= optimizer_tensors(optimizer, f"{_OPTIMIZER}{number}:")
    tensors[_RANDOM] = torch.get_rng_state()
    told = {name: value for name, value in vars(state).items() if name not in {"best", "evaluations"}}
    told["evaluations"] = [asdict(evaluation) for evaluation in state.evaluations]
    return Snapshot(tensors, {"state": told, "scaler": scaler.state_dict()})


@torch.no_grad()
def restore(
    snapshot: Snapshot, model: nn.Module, optimizers: Sequence[Optimizer], scaler: torch.amp.GradScaler
) -> RunState:
    """Put model, optimizers and scale where they were, and give the state of the run."""
    for name, parameter in learning(model):
        parameter.copy_(like(snapshot.tensors[_MODEL + name], parameter))
    told: dict[str, Any] = dict(snapshot.told["state"])
    for number, optimizer in enumerate(() if told["is_over"] else optimizers):
        restore_optimizer(optimizer, f"{_OPTIMIZER}{number}:", snapshot.tensors)
    torch.set_rng_state(snapshot.tensors[_RANDOM])
    if scaler.is_enabled():
        scaler.load_state_dict(dict(snapshot.told["scaler"]))
    told["evaluations"] = [Evaluation(**one) for one in told["evaluations"]]
    best = {
        name: like(snapshot.tensors[_BEST + name], parameter)
        for name, parameter in learning(model)
        if _BEST + name in snapshot.tensors
    }
    return RunState(**told, best=best)
