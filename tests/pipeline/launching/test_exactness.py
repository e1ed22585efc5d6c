"""What ranks generate over torch.distributed is what one process does."""

import pytest
import torch

from llmopt.engine.torch import TorchEngine
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.source import open_source
from llmopt.partition.runtime.schedule import micro_batches
from llmopt.pipeline.launching.job import Job
from tests.forked import run_forked
from tests.partition.ranks import layout_of

PROMPTS = ((5, 9, 77, 3, 100, 42), (1, 2, 3, 50, 60, 70))
OUTPUT = 4


@pytest.mark.parametrize(
    ("stages", "count"),
    [
        (((3, 1), (1, 1)), 2),
        (((1, 1), (2, 1), (1, 1)), 1),
        (((1, 1), (1, 1), (1, 1), (1, 1)), 6),
        (((4, 2),), 1),
        (((4, 3),), 2),
        (((1, 2), (3, 2)), 2),
    ],
)
def test_launched_tokens_and_logits_are_those_of_a_single_process(six_heads, tmp_path, stages, count):
    job = Job(
        model=str(six_heads),
        layout=layout_of(*stages),
        ids_BT=PROMPTS,
        output=OUTPUT,
        cut=micro_batches(count, len(PROMPTS), len(PROMPTS[0])),
        keep_logits=True,
        timeout_s=30,
    )
    outcome = run_forked(job, tmp_path)
    source = open_source(str(six_heads))
    whole_BT = torch.cat([torch.tensor(PROMPTS), outcome.ids_BT], 1).numpy()
    with open_checkpoint(source) as checkpoint:
        expected_BTV = torch.from_numpy(TorchEngine(source.spec, checkpoint).logits(whole_BT))[:, 5:-1]
    torch.testing.assert_close(outcome.logits_BTV, expected_BTV, atol=1e-4, rtol=0)
    assert torch.equal(outcome.ids_BT, expected_BTV.argmax(-1))
    for report in outcome.reports:
        assert len(report.rounds) == 1
        assert len(report.rounds[0].phases) == OUTPUT


def test_a_rank_sends_hidden_states_and_token_ids_and_nothing_else(six_heads, tmp_path):
    job = Job(model=str(six_heads), layout=layout_of((2, 1), (2, 1)), ids_BT=PROMPTS, output=OUTPUT, timeout_s=30)
    first, last = run_forked(job, tmp_path).reports
    batch, hidden_bytes, token_bytes = 2, 48 * 4, 8
    assert [phase.sent_bytes for phase in first.rounds[0].phases] == [
        batch * 6 * hidden_bytes,
        *[batch * hidden_bytes] * (OUTPUT - 1),
    ]
    assert [phase.sent_bytes for phase in last.rounds[0].phases] == [batch * token_bytes] * OUTPUT
    assert first.weight_bytes < last.weight_bytes  # the norm before the head
