"""Which process holds what: stages one behind the other, the ranks of each side by side.

Ranks are numbered stage by stage. Within a stage every rank holds the same blocks, and of each its share.
"""

from dataclasses import dataclass

from llmopt.errors import UsageError
from llmopt.words import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLayout:
    """Blocks `first` to `stop` (exclusive) on `degree` ranks, which are called by `devices`."""

    first: int
    stop: int
    degree: int = 1
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """The place of one rank: its stage, and its number within the stage."""

    rank: int
    stage: int
    index: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Stages that hold all blocks of a model in their order; the first embeds, the last has the head."""

    stages: tuple[StageLayout, ...]

    @property
    def size(self) -> int:
        """Ranks of all stages together."""
        return sum(stage.degree for stage in self.stages)

    def seat(self, rank: int) -> Seat:
        """Where a rank sits."""
        first = 0
        for number, stage in enumerate(self.stages):
            if rank < first + stage.degree:
                return Seat(rank=rank, stage=number, index=rank - first)
            first += stage.degree
        raise AssertionError(f"rank {rank} of {self.size}")

    def ranks(self, stage: int) -> range:
        """The ranks of a stage."""
        first = sum(each.degree for each in self.stages[:stage])
        return range(first, first + self.stages[stage].degree)

    def sender(self, seat: Seat, stage: int) -> int:
        """Which rank of another stage, all of which have the same to say, speaks to this one."""
        return self.ranks(stage)[seat.index % self.stages[stage].degree]

    def receivers(self, seat: Seat, stage: int) -> list[int]:
        """To which ranks of another stage this one speaks."""
        ranks, degree = self.ranks(stage), self.stages[seat.stage].degree
        return [rank for index, rank in enumerate(ranks) if index % degree == seat.index]

    def name(self, rank: int) -> str:
        """What people know a rank by."""
        seat = self.seat(rank)
        devices = self.stages[seat.stage].devices
        where = f" on {devices[seat.index]}" if devices else ""
        return f"rank {rank} (stage {seat.stage}{where})"

    def require(self, blocks: int) -> None:
        """See that each of so many blocks has one stage.

        Raises:
            UsageError: one has none, or two.
        """
        stop = 0
        for number, stage in enumerate(self.stages):
            if stage.first != stop or stage.stop < stage.first:
                raise UsageError(
                    f"stage {number} has blocks {stage.first} to {stage.stop}, where block {stop} is next",
                    hint="make the plan anew with llmopt partition",
                )
            stop = stage.stop
        if stop != blocks:
            raise UsageError(
                f"the stages hold {counted(stop, 'block')}, and the model has {blocks}",
                hint="was the plan made for this model?",
            )
