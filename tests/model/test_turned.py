"""A turned model is the same model: its logits are those of the stored one, in every family that can be turned."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llmopt.engine.blocks import RotaryTables, embed
from llmopt.engine.torch import TorchEngine
from llmopt.model.spec import ModelSpec
from llmopt.model.turned import TurnedTensors, obstacle, turned_spec
from llmopt.quantize.rotate import random_rotation
from tests.families import CASES, Saved, random_weights, spec_of

IDS_BT = np.random.default_rng(0).integers(0, 97, (2, 30))
CANNOT = ("gemma3", "gpt2", "opt")
CAN = [case for case in CASES if not case.startswith(CANNOT)]


def turn_of(size: int) -> torch.Tensor:
    """Orthogonal, and not symmetric: a transposed one would be seen."""
    return random_rotation(size, torch.Generator().manual_seed(2))


def both(case: str) -> tuple[ModelSpec, Saved, TurnedTensors]:
    spec = spec_of(CASES[case])
    saved = random_weights(spec)
    return spec, saved, TurnedTensors(saved, spec, turn_of(spec.hidden_size))


def hidden(spec: ModelSpec, tensors) -> torch.Tensor:
    engine = TorchEngine(spec, tensors, keep=False)
    return engine.hidden(torch.from_numpy(IDS_BT), RotaryTables(spec, IDS_BT.shape[1]))


@pytest.mark.parametrize("case", CAN)
def test_logits_are_those_of_the_stored_model(case):
    spec, saved, turned = both(case)
    expected = TorchEngine(spec, saved).logits(IDS_BT)
    found = TorchEngine(turned.spec, turned).logits(IDS_BT)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", CAN)
def test_the_stream_is_turned_all_the_way(case):
    spec, saved, turned = both(case)
    expected = hidden(spec, saved) @ turn_of(spec.hidden_size)
    torch.testing.assert_close(hidden(turned.spec, turned), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("case", CAN)
def test_norms_around_the_stream_multiply_by_one_and_those_of_heads_as_they_did(case):
    spec, saved, turned = both(case)
    around = {spec.final_norm.name} | {n.name for b in spec.blocks for n in (b.attention_norm, b.mlp_norm)}
    norms = [spec.final_norm, *(norm for block in spec.blocks for norm in block.norms())]
    for norm in norms:
        weight = next(norm.tensors())
        expected = torch.ones(norm.size) if norm.name in around else saved.read(weight)
        assert torch.equal(turned.read(weight), expected)


def test_a_norm_that_stores_its_gain_less_one_stores_zeros():
    spec = spec_of(CASES["llama"])
    blocks = spec.blocks
    spec = replace(spec, final_norm=replace(spec.final_norm, offset=1.0), blocks=blocks)
    saved = random_weights(spec)
    turned = TurnedTensors(saved, spec, turn_of(spec.hidden_size))
    assert torch.equal(turned.read(next(spec.final_norm.tensors())), torch.zeros(spec.hidden_size))
    expected = TorchEngine(spec, saved).logits(IDS_BT)
    found = TorchEngine(turned.spec, turned).logits(IDS_BT)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", CAN)
def test_without_a_rotation_gains_alone_move(case):
    spec, saved, _ = both(case)
    unit = TurnedTensors(saved, spec, None)
    expected = TorchEngine(spec, saved).logits(IDS_BT)
    assert np.abs(TorchEngine(unit.spec, unit).logits(IDS_BT) - expected).max() < 1e-5 * np.abs(expected).max()
    torch.testing.assert_close(hidden(unit.spec, unit), hidden(spec, saved), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "phi3, plain"])
def test_rows_are_those_of_the_whole(case):
    _, _, turned = both(case)
    for tensor in turned.spec.tensors():
        if len(tensor.shape) == 2:
            rows = turned.read_rows(tensor, 3, 11)
            torch.testing.assert_close(rows, turned.read(tensor)[3:11], rtol=0, atol=1e-6)
            assert rows.shape == (8, tensor.shape[1])


def test_a_tied_head_alone_needs_a_product_before_it():
    tied, untied = spec_of(CASES["qwen3"]), spec_of(CASES["qwen2"])
    assert turned_spec(untied) == untied
    extra = set(turned_spec(tied).tensors()) - set(tied.tensors())
    assert [(tensor.name, tensor.shape) for tensor in extra] == [("lm_head.turn.weight", (64, 64))]
    assert list(turned_spec(tied).linears()) == list(tied.linears())


@pytest.mark.parametrize(
    ("case", "reason"),
    [("gpt2", "the mean"), ("opt", "the mean"), ("gemma3", "before it is added"), ("llama", None), ("qwen3", None)],
)
def test_what_cannot_be_turned_is_said(case, reason):
    found = obstacle(spec_of(CASES[case]))
    assert found is None if reason is None else (found is not None and reason in found)


def test_the_table_is_turned_and_what_a_token_enters_with_is_too():
    spec, saved, turned = both("llama, tied, wide heads")
    ids = torch.from_numpy(IDS_BT)
    stored = embed(spec.embedding, {t.name: saved.read(t) for t in spec.embedding.tensors()}, ids)
    found = embed(spec.embedding, {t.name: turned.read(t) for t in spec.embedding.tensors()}, ids)
    torch.testing.assert_close(found, stored @ turn_of(64), rtol=0, atol=1e-5)
