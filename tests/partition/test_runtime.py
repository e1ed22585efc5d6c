"""Stages on ranks compute what one process does, for every family, split and cut."""

import pytest
import torch
import transformers

from llmopt.engine.torch import TorchEngine
from llmopt.errors import UsageError
from llmopt.partition.runtime.cut import Cut, Share, block_cuts
from llmopt.partition.runtime.schedule import MicroBatches, micro_batches
from llmopt.partition.runtime.stage import DecoderStage
from tests.families import CASES, COMMON, random_weights, spec_of
from tests.partition.ranks import generate_in_threads, layout_of

PROMPT, OUTPUT = 5, 3
THREE_HEADS = transformers.LlamaConfig(
    **COMMON | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "intermediate_size": 60}
)


def ids(batch):
    return torch.randint(0, 97, (batch, PROMPT), generator=torch.Generator().manual_seed(1))


def require_exact(spec, layout, *, batch=2, cut=MicroBatches()):  # noqa: B008 (frozen)
    saved = random_weights(spec)
    tokens_BT, logits_BTV = generate_in_threads(spec, saved, layout, ids(batch), output=OUTPUT, cut=cut)
    whole_BT = torch.cat([ids(batch), tokens_BT], 1).numpy()
    expected_BTV = torch.from_numpy(TorchEngine(spec, saved).logits(whole_BT))[:, PROMPT - 1 : -1]
    torch.testing.assert_close(logits_BTV, expected_BTV, atol=1e-4, rtol=0)
    assert torch.equal(tokens_BT, expected_BTV.argmax(-1))


@pytest.mark.parametrize("family", CASES)
def test_two_stages_of_two_ranks_compute_what_one_process_does(family):
    spec = spec_of(CASES[family])
    require_exact(spec, layout_of((1, 2), (len(spec.blocks) - 1, 2)), cut=MicroBatches(sequences=2))


@pytest.mark.parametrize(
    "stages",
    [
        ((3, 1),),
        ((1, 1), (2, 1)),
        ((1, 1), (1, 1), (1, 1)),
        ((1, 1), (1, 1), (1, 1), (0, 1)),  # the head alone on the last
        ((0, 2), (3, 1)),  # and the embedding on the first
        ((3, 3),),
        ((1, 3), (2, 1)),
        ((1, 1), (2, 3)),
    ],
)
def test_any_contiguous_split_and_any_legal_degree_is_exact(stages):
    require_exact(spec_of(THREE_HEADS), layout_of(*stages))


@pytest.mark.parametrize(
    "cut",
    [MicroBatches(), MicroBatches(sequences=3), MicroBatches(tokens=5), MicroBatches(sequences=2, tokens=2)],
)
def test_micro_batches_change_nothing(cut):
    require_exact(spec_of(THREE_HEADS), layout_of((2, 1), (1, 3)), batch=3, cut=cut)


def test_a_batch_is_cut_by_sequences_first_and_else_by_tokens():
    assert micro_batches(4, batch=4, prompt=100) == MicroBatches(sequences=4)
    assert micro_batches(8, batch=4, prompt=100) == MicroBatches(tokens=8)
    with pytest.raises(UsageError, match="101 micro-batches of 4 × 100 tokens"):
        micro_batches(101, batch=4, prompt=100)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_the_ranks_of_a_stage_read_each_weight_once_and_together_all_of_it(family):
    spec = spec_of(CASES[family])
    shares = [list(block_cuts(spec.blocks[0], Share(index, 2))) for index in range(2)]
    for first, second in zip(*shares, strict=True):
        assert first.tensor == second.tensor
        whole = torch.arange(first.tensor.count).reshape(first.tensor.shape)
        pieces = [piece.take(whole).flatten() for piece in (first, second)]
        if first.ranges:
            assert sorted(torch.cat(pieces).tolist()) == whole.flatten().tolist()
        assert [piece.shape for piece in (first, second)] == [piece.take(whole).shape for piece in (first, second)]
    cut = {piece.tensor.name for piece in shares[0] if piece.ranges}
    assert cut >= {linear.weight.name for linear in spec.blocks[0].linears()}


def test_columns_are_read_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr("llmopt.partition.runtime.cut._READ_AT_ONCE", 64)
    spec = spec_of(CASES["llama"])
    saved, down = random_weights(spec), spec.blocks[0].mlp.down.weight
    found = Cut(down, 1, ((40, 80),)).read(saved)
    assert torch.equal(found, saved.read(down)[:, 40:80])


def test_a_stage_reads_a_tied_table_once_and_two_stages_read_it_twice():
    spec = spec_of(CASES["qwen3"])
    table = f"{spec.embedding.name}.weight"

    def read_by(layout, rank):
        return [piece.tensor.name for piece in DecoderStage.cuts(spec, layout, layout.seat(rank))]

    assert read_by(layout_of((3, 1)), 0).count(table) == 1
    both = layout_of((1, 1), (2, 1))
    assert [read_by(both, rank).count(table) for rank in range(2)] == [1, 1]
    middle = layout_of((1, 1), (1, 1), (1, 1))
    assert read_by(middle, 1).count(table) == 0


@pytest.mark.parametrize(
    ("stages", "told"),
    [(((1, 1), (1, 1)), "the stages hold 2 blocks, and the model has 3"), (((4, 1),), "the stages hold 4 blocks")],
)
def test_a_layout_that_is_not_the_models_is_refused(stages, told):
    with pytest.raises(UsageError, match=told):
        layout_of(*stages).require(3)
