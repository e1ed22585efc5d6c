"""One block of requests to one engine, in the process that calls it: warm up, then time each request.

TTFT runs from submitting a request, its KV buffers included, to its first token. TPOT is the rest of the request
divided by the tokens that came after the first. Both include finding the most likely token, which every user pays for.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from llmopt.engine.base import Engine, TokenIds
from llmopt.measure.memory import peak_rss_bytes

MIN_WARMUP_CALLS = 4
MAX_WARMUP_CALLS = 20
MIN_WARMUP_S = 0.2  # a small model's four calls end before the processor has left its idle clock
FLAT = 0.02

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a measuring process is asked to do. With no `repetitions` it only opens the artifact.

    After `prompt_ids` come `continuation_ids`, whatever the model would have said: all variants do the same work.
    """

    path: str
    threads: int
    prompt_ids: list[int] = field(default_factory=list)
    continuation_ids: list[int] = field(default_factory=list)
    repetitions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What it answers. `settled` is whether the calls had become steady when the measuring began."""

    engine: str
    vocab_size: int
    warmup_calls: int = 0
    settled: bool = True
    ttft_ms: list[float]
    tpot_ms: list[float]
    peak_rss_bytes: int | None = None


def run_block(engine: Engine, job: Job, clock: Clock = time.perf_counter) -> Block:
    """Measure `job.repetitions` requests, after as many unmeasured ones as it takes for them to become steady."""
    if not job.repetitions:
        return Block(engine=engine.name, vocab_size=engine.vocab_size, ttft_ms=[], tpot_ms=[])
    prompt_T = np.array(job.prompt_ids, np.int64)
    continuation = [np.array([token], np.int64) for token in job.continuation_ids]
    dropped, settled = _warm_up(lambda: sum(_request_s(engine, prompt_T, continuation, clock)))
    timed = [_request_s(engine, prompt_T, continuation, clock) for _ in range(job.repetitions)]
    return Block(
        engine=engine.name,
        vocab_size=engine.vocab_size,
        warmup_calls=dropped,
        settled=settled,
        ttft_ms=[1e3 * first for first, _ in timed],
        tpot_ms=[1e3 * rest / len(continuation) for _, rest in timed],
        peak_rss_bytes=peak_rss_bytes(),
    )


def _request_s(engine: Engine, prompt_T: TokenIds, continuation: list[TokenIds], clock: Clock) -> tuple[float, float]:
    """Seconds to the first token, and seconds for the others."""
    submitted = clock()
    stream = engine.stream(len(prompt_T) + len(continuation))
    stream.feed(prompt_T).argmax()
    first = clock()
    for token in continuation:
        stream.feed(token).argmax()
    return first - submitted, clock() - first


def _warm_up(call_s: Callable[[], float]) -> tuple[int, bool]:
    """Call until the running median is flat: how many calls it took, and whether it became so before the limit."""
    durations_s: list[float] = []
    total_s = 0.0
    while len(durations_s) < MAX_WARMUP_CALLS or total_s < MIN_WARMUP_S:
        durations_s.append(call_s())
        total_s += durations_s[-1]
        if len(durations_s) >= MIN_WARMUP_CALLS and total_s >= MIN_WARMUP_S and _flat(durations_s):
            return len(durations_s), True
    return len(durations_s), False


def _flat(durations_s: list[float]) -> bool:
    """Whether the median of the last three calls is that of the three before the last."""
    now, before = statistics.median(durations_s[-3:]), statistics.median(durations_s[-4:-1])
    return abs(now - before) <= FLAT * before
