"""Several processes that train one model, each on its share of every batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")


class Replicas(Protocol):
    """The processes of a run, this one among them; they exchange in the same order. The first reads, writes, speaks."""

    rank: int
    size: int

    def of_first(self, compute: Callable[[], Value]) -> Value:
        """What the first process computes, on all."""
        ...

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of those of all."""
        ...


class Alone:
    """A process without others."""

    rank = 0
    size = 1

    def of_first(self, compute: Callable[[], Value]) -> Value:
        """What this process computes."""
        return compute()

    def add_up(self, tensor: Tensor) -> None:
        """It is the sum already."""


def replicated(model: nn.Module, replicas: Replicas) -> nn.Module:
    """The model; of several processes, one whose gradients become their mean over all as they are computed."""
    if replicas.size == 1:
        return model
    return DistributedDataParallel(model)


def without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Within it, gradients stay this process's own: more of the same batch are to come."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def share(batches: list[Tensor], replicas: Replicas) -> list[Tensor]:
    """This process's part of a step; every process has as many."""
    assert len(batches) % replicas.size == 0, "all processes take the same number of batches"
    return batches[replicas.rank :: replicas.size]
