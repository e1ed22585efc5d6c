"""Where a loss stopped being a number."""

from typing import Any

import torch
from torch import Tensor, nn

from llmopt.errors import DivergedError
from llmopt.train.divided import whole

_HINT = "a lower rate, or more precision, may help"


def diverged(model: nn.Module, batch: Tensor | None, step: int, kept: int | None, what: str) -> DivergedError:
    """The error of a run whose step, from 1, gave what is no number.

    Args:
        model: looked through for the first module, or else the first gradient, that holds such a number.
        batch: what the loss was of; None if the loss was finite, and a gradient is not.
        step: that of the run.
        kept: the step of the last good checkpoint.
        what: was no number.
    """
    place = bad_gradient(model) if batch is None else (bad_module(model, batch) or bad_parameter(model))
    good = "there is no checkpoint" if kept is None else f"the last good checkpoint is that of step {kept}"
    return DivergedError(f"step {step}: the {what} is not a number; {good}", where=place, hint=_HINT)


@torch.no_grad()
def bad_module(model: nn.Module, batch: Tensor) -> str | None:
    """The first module whose output is not finite, by its name; None if all are."""
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            if not found and any(isinstance(one, Tensor) and not bool(one.isfinite().all()) for one in tensors):
                found.append(name)

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules() if name]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return next(iter(found), None)


def bad_gradient(model: nn.Module) -> str | None:
    """The first parameter whose gradient is not finite."""
    named = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return next((name for name, grad in named if grad is not None and not bool(whole(grad).isfinite().all())), None)


def bad_parameter(model: nn.Module) -> str | None:
    """The first parameter that is not finite itself."""
    return next((name for name, one in model.named_parameters() if not bool(whole(one).isfinite().all())), None)
