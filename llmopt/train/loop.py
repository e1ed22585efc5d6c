"""The training loop: everything that learns here learns in it.

Products are computed in `Settings.precision` under torch's autocast. The model's parameters are the master weights:
float32, as are gradients and updates, so that what is too small to change a weight of 16 bits adds up. With fp16 the
loss is scaled (see `LossScale`).

A step takes some batches, whose gradients are averaged. Which ones is a function of the step alone, so a run that was
stopped goes on from a checkpoint with the batches that it would have seen, to the bytes of a run that was not stopped.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from llmopt.errors import UsageError
from llmopt.measure.memory import peak_rss_bytes
from llmopt.progress import Progress, Silent
from llmopt.train.checkpoint import Checkpoints, Snapshot
from llmopt.train.diverged import diverged
from llmopt.train.divided import OfFirst, gather, gathered, is_divided, whole
from llmopt.train.replicas import Alone, Replicas, replicated, share, without_exchange
from llmopt.train.settings import Precision, Settings
from llmopt.train.state import Outcome, RunState, capture, restore

# The batches of each step from that of a number on. A batch is tensor of token ids, [windows, tokens].
Batches = Callable[[int], Iterator[Sequence[Tensor]]]
Evaluate = Callable[[], float]
Value = TypeVar("Value")


class Trainer:
    """A run. `model(batch)` gives the mean loss of a batch; the rates of `optimizers` are their peaks.

    A model that was divided among the `replicas` before (see `llmopt.train.divided`) stays so, and its checkpoints are
    those of one that was not.

    Raises:
        UsageError: a parameter that is to learn is no float32.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        batches: Batches,
        settings: Settings,
        *,
        evaluate: Evaluate | None = None,
        checkpoints: Checkpoints | None = None,
        replicas: Replicas | None = None,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        require_masters(model)
        self.model = model
        self.optimizers = optimizers
        self.batches = batches
        self.settings = settings
        self.evaluate = evaluate
        self.checkpoints = checkpoints
        self.replicas = replicas or Alone()
        self.progress = progress or Silent()
        self.clock = clock
        self.state = RunState()
        self.divided = is_divided(model)
        self.saves = self._of_first_if_divided(lambda: checkpoints is not None)
        self._began = self._saved = clock()
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.scaler = torch.amp.GradScaler(
            device="cpu",
            init_scale=settings.scale.start,
            growth_interval=settings.scale.growth_steps,
            enabled=settings.precision is Precision.FP16,
        )

    def run(self, description: str = "training") -> Outcome:
        """Train to the end, from the last checkpoint if there is one.

        Raises:
            DivergedError: a loss or a gradient is no number.
        """
        self._resume()
        self._began = self.clock() - self.state.seconds
        self._saved = self.clock()
        if not self.state.is_over:
            # Gradients of a model that is divided become their mean over all processes anyway.
            self._train(self.model if self.divided else replicated(self.model, self.replicas), description)
            self._evaluate()
            self.state.is_over = True
            self.state.restore_best(self.model)
            self._save()
        return self.state.outcome(self._elapsed(), peak_rss_bytes())

    def _train(self, model: nn.Module, description: str) -> None:
        done = 0.0
        with self.progress.task(description, total=100) as task:
            if self.state.step == 0:
                self._evaluate()  # what it starts from is the best so far
            for batches in self.batches(self.state.step):
                # The clock of the first process decides for all.
                before, (done, rate) = done, self.replicas.of_first(self._done_and_rate)
                task.advance(100 * (done - before), note=self._note())
                if self.state.is_over or done >= 1.0:
                    break
                self._step(model, list(batches), rate)
                self._after_step()

    def _done_and_rate(self) -> tuple[float, float]:
        step, elapsed_s = self.state.step, self._elapsed()
        return self.settings.done(step, elapsed_s), self.settings.rate(step, elapsed_s)

    def _note(self) -> str:
        return f"step {self.state.step}, loss {self.state.losses[-1]:.4f}" if self.state.losses else "step 1"

    def _of_first_if_divided(self, compute: Callable[[], Value]) -> Value:
        """What all processes have to agree upon, if each holds but a share of the model."""
        return self.replicas.of_first(compute) if self.divided else compute()

    def _step(self, model: nn.Module, batches: list[Tensor], rate: float) -> None:
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
        own = share(batches, self.replicas)
        loss = self._backward(model, own)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self._update()
        self.state.step += 1
        self.state.tokens += sum(batch.numel() for batch in batches)
        self.state.losses.append(loss)

    def _backward(self, model: nn.Module, own: list[Tensor]) -> float:
        """The mean loss of a step over all processes; gradients are left at the parameters."""
        total = torch.zeros(())
        for index, batch in enumerate(own):
            last = index == len(own) - 1
            with nullcontext() if last else without_exchange(model):
                with self._autocast():
                    loss = model(batch) / len(own)
                self.scaler.scale(loss).backward()
            total += loss.detach().float()
        self.replicas.add_up(total)
        mean = float(total) / self.replicas.size
        if not math.isfinite(mean):
            with gathered(self.model):
                bad = next((batch for batch in own if not self._is_finite(batch)), own[0])
                with self._autocast():
                    error = diverged(self.model, bad, self.state.step + 1, self._kept_step(), "loss")
            raise error
        return mean

    def _update(self) -> None:
        """Move the parameters; where a scaled gradient has overflowed, the scale instead."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        finite = bool(whole(norm).isfinite())
        may_back_off = self.scaler.is_enabled() and self.scaler.get_scale() > self.settings.scale.smallest
        if not finite and not may_back_off:
            raise diverged(self.model, None, self.state.step + 1, self._kept_step(), "gradient")
        if self.settings.clip is not None:
            clip_grads_with_norm_(parameters, self.settings.clip, norm)
        for optimizer in self.optimizers:
            if finite:
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        self.state.scales.append(self.scaler.get_scale())

    def _is_finite(self, batch: Tensor) -> bool:
        with torch.no_grad(), self._autocast():
            return bool(self.model(batch).isfinite())

    def _autocast(self) -> AbstractContextManager[object]:
        if self.settings.precision is Precision.FP32:
            return nullcontext()
        return torch.autocast("cpu", dtype=self.settings.precision.dtype)

    def _after_step(self) -> None:
        # By the share of the run that is done, which is the clock's where there are minutes and no steps.
        done, _ = self.replicas.of_first(self._done_and_rate)
        if int(done * self.settings.evaluations) >= len(self.state.evaluations):
            self._evaluate()
        if self.saves and self._of_first_if_divided(self._is_due):
            self._save()

    def _evaluate(self) -> None:
        """Ask for the loss on held-out text; the best state is kept, if the run may end before its last step."""
        if self.evaluate is None or (self.state.evaluations and self.state.evaluations[-1].step == self.state.step):
            return
        if self.divided:  # none can compute alone
            own = self._held_out_loss()
            loss = self.replicas.of_first(lambda: own)
        else:
            loss = self.replicas.of_first(self._held_out_loss)
        if not math.isfinite(loss):
            raise diverged(self.model, None, self.state.step, self._kept_step(), "loss on held-out text")
        self.state.evaluated(loss, self.model, self.settings.patience)
        self.progress.say(f"step {self.state.step}: loss on held-out text {loss:.4f}")

    def _held_out_loss(self) -> float:
        assert self.evaluate is not None
        with torch.no_grad(), self._autocast():
            return self.evaluate()

    def _is_due(self) -> bool:
        every = self.settings.checkpoint_steps
        if every is not None and self.state.step % every == 0:
            return True
        return self.clock() - self._saved >= self.settings.checkpoint_seconds

    def _save(self) -> None:
        if not self.saves:
            return
        self.state.seconds = self._elapsed()
        snapshot = capture(self.model, self.optimizers, self.scaler, self.state)
        if self.checkpoints is None:
            gather(snapshot.tensors.values())
        else:
            self.checkpoints.write(self.state.step, snapshot)
        self._saved = self.clock()

    def _resume(self) -> None:
        """Go on from the last checkpoint, which the first process reads for all."""
        found = self._read_divided() if self.divided else self.replicas.of_first(self._read)
        if found is not None:
            step, snapshot = found
            self.state = restore(snapshot, self.model, self.optimizers, self.scaler)
            self.progress.say(f"training goes on behind step {step}")

    def _read(self) -> tuple[int, Snapshot] | None:
        return None if self.checkpoints is None else self.checkpoints.read()

    def _read_divided(self) -> tuple[int, Snapshot] | None:
        """The last checkpoint, whose tensors come one by one: no other process has room for all of them."""
        found = self._read() if self.saves else None
        told = self.replicas.of_first(lambda: None if found is None else (found[0], found[1].told))
        if told is None:
            return None
        return told[0], Snapshot(OfFirst({} if found is None else found[1].tensors, self.replicas), told[1])

    def _kept_step(self) -> int | None:
        return max(self.checkpoints.steps(), default=None) if self.checkpoints is not None else None

    def _elapsed(self) -> float:
        return self.clock() - self._began


def require_masters(model: nn.Module) -> None:
    """See that what learns is float32.

    Raises:
        UsageError: it is not, and many small updates would vanish.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise UsageError(
                f"weights learn in float32, and these are {parameter.dtype}",
                where=name,
                hint="precision says what products are computed in: convert the model with .float()",
            )
