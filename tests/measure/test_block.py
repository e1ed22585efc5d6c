import json
from dataclasses import asdict

import numpy as np
import pytest

from llmopt.measure import block
from llmopt.measure.block import Job, run_block

TIMED = Job(path="here", threads=1, prompt_ids=[5, 6, 7], continuation_ids=[8, 9], repetitions=3)


class ClockedEngine:
    """Feeding takes as long as `seconds(request, tokens)` says, on a clock of its own."""

    name, vocab_size = "clocked 1", 10

    def __init__(self, seconds):
        self.seconds = seconds
        self.now = 0.0
        self.fed = []

    def clock(self):
        return self.now

    def stream(self, capacity):
        self.fed.append([])
        self.capacity = capacity
        return self

    def feed(self, ids_T):
        self.fed[-1].append(ids_T.tolist())
        self.now += self.seconds(len(self.fed) - 1, len(ids_T))
        return np.zeros(self.vocab_size, np.float32)

    def measure(self, job=TIMED):
        return run_block(self, job, self.clock)


def by_token(request, tokens):
    return 0.25 if tokens > 1 else 0.0625  # exact in binary


def test_ttft_is_the_prompt_and_tpot_the_rest_over_the_tokens_after_the_first():
    found = ClockedEngine(by_token).measure()
    assert found.ttft_ms == [250.0] * 3
    assert found.tpot_ms == [62.5] * 3
    assert (found.engine, found.vocab_size) == ("clocked 1", 10)
    assert found.peak_rss_bytes is None or found.peak_rss_bytes > 1e6


def test_every_request_does_the_same_forced_work_in_a_sequence_that_just_fits():
    engine = ClockedEngine(by_token)
    found = engine.measure()
    assert engine.fed == [[[5, 6, 7], [8], [9]]] * (found.warmup_calls + 3)
    assert engine.capacity == 5


def test_steady_calls_are_warm_after_the_fewest_calls():
    found = ClockedEngine(by_token).measure()
    assert (found.warmup_calls, found.settled) == (block.MIN_WARMUP_CALLS, True)


def test_fast_calls_warm_up_for_a_while_all_the_same():
    found = ClockedEngine(lambda request, tokens: 2.0**-12).measure()  # 3 feeds a request: 0.73 ms
    assert found.warmup_calls == pytest.approx(block.MIN_WARMUP_S / (3 * 2.0**-12), abs=1)


def test_calls_that_still_become_faster_are_dropped():
    found = ClockedEngine(lambda request, tokens: 0.1 * max(0.9**request, 0.35)).measure()
    assert found.settled
    assert found.warmup_calls > 9
    assert max(found.ttft_ms) == pytest.approx(35)


def test_warming_up_ends_at_its_limit_and_says_that_it_did():
    found = ClockedEngine(lambda request, tokens: 0.1 * 1.1**request).measure()
    assert (found.warmup_calls, found.settled) == (block.MAX_WARMUP_CALLS, False)


def test_a_job_without_repetitions_only_opens_the_engine():
    engine = ClockedEngine(by_token)
    found = engine.measure(Job(path="here", threads=1))
    assert engine.fed == []
    assert (found.vocab_size, found.ttft_ms) == (10, [])


def test_a_block_survives_the_way_through_json():
    found = ClockedEngine(by_token).measure()
    assert block.Block(**json.loads(json.dumps(asdict(found)))) == found
