"""What ranks exchange, over torch.distributed: hidden states, token ids, and sums within a stage; nothing else.

Messages to another stage are sent while the sender goes on; each pair of ranks exchanges them in their order.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from llmopt.partition.runtime.layout import Layout, Seat
from llmopt.partition.runtime.sums import Sums
from llmopt.partition.runtime.trace import Trace

_UNDERWAY = 64  # messages that may wait for their receivers: more are not memory well spent


class Wire:
    """The connections of one rank. Make it on all ranks at the same time."""

    def __init__(self, layout: Layout, seat: Seat, device: torch.device, trace: Trace) -> None:
        self.stage, self.stages = seat.stage, len(layout.stages)
        self.device = device
        self._layout, self._seat, self._trace = layout, seat, trace
        self._underway: list[tuple[dist.Work, Tensor]] = []
        # Every rank takes part in making every group, its own or not.
        groups = [dist.new_group(list(layout.ranks(stage))) for stage in range(len(layout.stages))]
        self._sums = Sums(layout.ranks(seat.stage), groups[seat.stage], device)
        self._degree = layout.stages[seat.stage].degree

    def send(self, values: Tensor, stage: int) -> None:
        """Send to those ranks of a stage to whom this one speaks."""
        values = values.contiguous()
        for rank in self._layout.receivers(self._seat, stage):
            work = dist.isend(values, rank)
            assert work is not None
            self._underway.append((work, values))
            self._trace.now.sent_bytes += values.nbytes
        self._arrive(_UNDERWAY)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, stage: int) -> Tensor:
        """What a stage sends to this rank."""
        rank = self._layout.sender(self._seat, stage)
        values = torch.empty(shape, dtype=dtype, device=self.device)
        with self._trace.wait_for(self._layout.name(rank)):
            dist.recv(values, rank)
        return values

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over the ranks of this stage, in the place of `values`."""
        values = values.contiguous()
        with self._trace.adding(values.nbytes):
            self._sums.add_up(values)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each value over the ranks of this stage, in the place of `values`."""
        values = values.contiguous()
        with self._trace.adding(values.nbytes):
            self._sums.largest(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """What all ranks of this stage have, one shape for all, along a new first axis."""
        if self._degree == 1:
            return values[None]
        found = values.new_zeros((self._degree, *values.shape))
        found[self._seat.index] = values
        return self.add_up(found)

    def flush(self) -> None:
        """Wait until all that was sent has arrived."""
        self._arrive(0)

    def _arrive(self, left: int) -> None:
        """Wait until no more than so many messages are underway."""
        while len(self._underway) > left:
            work, _ = self._underway.pop(0)
            with self._trace.wait_for("the next stage"):
                work.wait()
