"""A model that is divided among processes, none of which could hold all that training it takes.

Each keeps its share of the parameters, of their gradients, and of what optimizers remember (FSDP2, after Zhao et al.
2023, arXiv 2304.11277). A part is whole while it computes, forwards or backwards; then its shares alone are left.

torch's modules for that take a second to import, and 50 MB: they are asked for where something is divided.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

from llmopt.train.replicas import Replicas

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def divide(module: nn.Module) -> None:
    """Divide the parameters of a module that are not yet, in place; what is called is the module itself.

    Parts first, and the model last. Optimizers are made behind that.
    """
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def is_divided(module: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether it was."""
    return hasattr(module, "unshard")


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which this process may have a share alone; all of them ask for it together."""
    return tensor.full_tensor() if _is_share(tensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's share of a whole tensor, if it is one for each value of a parameter that is divided."""
    if not _is_share(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

    # No source: each process takes its share of what it has.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Within it the parameters of the modules are whole, and computing with them asks no other process."""
    divided = [one for module in modules for one in module.modules() if is_divided(one)]
    for one in divided:
        one.set_reshard_after_forward(False, recurse=False)
        one.unshard()
    try:
        yield
    finally:
        for one in divided:
            one.reshard()
            one.set_reshard_after_forward(True, recurse=False)


class OfFirst(Mapping[str, Tensor]):
    """The tensors of the first process, which hands out each as all ask for it; other processes have none."""

    def __init__(self, tensors: Mapping[str, Tensor], replicas: Replicas) -> None:
        self._tensors = tensors
        self._replicas = replicas
        self._names: list[str] = replicas.of_first(lambda: list(tensors))

    def __getitem__(self, name: str) -> Tensor:
        return self._replicas.of_first(lambda: self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def gather(tensors: Iterable[Tensor]) -> None:
    """Give the first process the shares that it asks for with `whole`, in the same order."""
    for tensor in tensors:
        whole(tensor)


def _is_share(tensor: Tensor) -> "TypeGuard[DTensor]":
    return hasattr(tensor, "full_tensor")
