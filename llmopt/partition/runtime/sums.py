"""What ranks add up, through memory that they share where there is some, and else as torch.distributed does it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llmopt.partition.runtime.shared import shared_places


class Sums:
    """Over `ranks`, which are those of `group`. All of them make it, and call its methods, at the same time."""

    def __init__(self, ranks: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self._places = shared_places(ranks, group) if len(ranks) > 1 and device.type == "cpu" else None

    def add_up(self, values: Tensor) -> None:
        """The sum of contiguous values over the ranks, in their place."""
        if self._places is None:
            dist.all_reduce(values, group=self._group)
        else:
            self._places.combine(values)

    def largest(self, values: Tensor) -> None:
        """Likewise the largest of each."""
        if self._places is None:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        else:
            self._places.combine(values, torch.maximum)
