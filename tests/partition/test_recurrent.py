"""An LSTM model over stages says what it does in one."""

import pytest
import torch

from llmopt.model.recurrent import RecurrentSpec
from llmopt.partition.runtime.recurrent import RecurrentStage
from llmopt.partition.runtime.schedule import WHOLE, MicroBatches
from tests.partition.ranks import generate_with, layout_of

SPEC = RecurrentSpec(layers=4, width=12, vocab_size=31)
IDS = torch.randint(0, 31, (4, 6), generator=torch.Generator().manual_seed(0))


def generated(layout, cut):
    def build(seat, wire):
        return RecurrentStage(SPEC, layout, seat)

    return generate_with(build, layout, IDS, output=3, cut=cut)


@pytest.mark.parametrize("cut", [WHOLE, MicroBatches(sequences=4), MicroBatches(tokens=6)])
@pytest.mark.parametrize("stages", [((2, 1), (2, 1)), ((1, 1), (3, 1), (0, 1))])
def test_stages_and_micro_batches_change_nothing(stages, cut):
    tokens_BT, logits_BTV = generated(layout_of(*stages), cut)
    expected_BT, expected_BTV = generated(layout_of((4, 1)), WHOLE)
    assert torch.equal(tokens_BT, expected_BT)
    torch.testing.assert_close(logits_BTV, expected_BTV)
