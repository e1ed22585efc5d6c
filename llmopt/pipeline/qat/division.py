"""Whether what training takes is divided among processes."""

from typing import TYPE_CHECKING

from llmopt.measure.memory import available_bytes
from llmopt.pipeline.estimate import Estimate
from llmopt.pipeline.ranks import place, processes_here
from llmopt.progress import Progress

if TYPE_CHECKING:
    from llmopt.pipeline.prepare import Prepared


def divides(prepared: "Prepared", progress: Progress) -> bool:
    """As was asked for; else where all of it has no room in this machine's memory, and shares have."""
    assert prepared.training is not None
    options, (_, size) = prepared.training.options, place()
    if size == 1 or options.by_block or options.shard is False:
        return False
    whole, shares = prepared.needed(sharing=1), prepared.needed(sharing=size)
    if options.shard is None and (_fits(whole) or not _fits(shares)):
        return False
    progress.say(
        f"what training takes is divided among {size} processes: each needs about {shares.memory_bytes / 1e6:,.0f} MB "
        f"of memory, and {whole.memory_bytes / 1e6:,.0f} MB if it held all"
    )
    return True


def _fits(needed: Estimate) -> bool:
    return needed.more_bytes * processes_here() <= available_bytes()
