"""Blocks that learn give what the float blocks give more nearly, or stay as they were."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from llmopt.engine.blocks import RotaryTables, block_forward, embed
from llmopt.model.spec import ModelSpec
from llmopt.pipeline import parts as parts_module
from llmopt.pipeline.calibration import Calibration
from llmopt.pipeline.parts import Part, PartReader
from llmopt.pipeline.ranks import Ranks
from llmopt.pipeline.reconstruct import Learning, Reconstruction
from llmopt.quantize.execute import quantized_apply
from llmopt.quantize.gptq import Gptq
from llmopt.quantize.learn import Rates
from llmopt.quantize.reconstruct import Reconstruct
from llmopt.quantize.weights import QuantizedWeight
from tests.decoders import assignments
from tests.families import CASES, random_weights, spec_of
from tests.pipeline.test_calibration import FAMILIES, case_named
from tests.ranks import together

WINDOWS = [np.random.default_rng(seed).integers(0, 97, 32) for seed in range(12)]
LEARNING = Learning(steps=30, windows=4, rates=Rates(offset=0.004, scale=0.002))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """So many steps as a test has time for."""
    made = lambda calibration, rule: Reconstruction(calibration, rule, LEARNING)  # noqa: E731
    monkeypatch.setattr(parts_module, "Reconstruction", made)


def parts_of(spec: ModelSpec, method: Gptq, scheme: str = "w4a16-sym", ranks: Ranks | None = None) -> list[Part]:
    calibration = Calibration(spec, WINDOWS) if ranks is None else Calibration(spec, WINDOWS, ranks)
    reader = PartReader(spec, random_weights(spec), assignments(spec, lambda name: scheme), method, calibration)
    embedding = reader.embedding()
    return [embedding, *reader.blocks(), reader.head(embedding)]


def behind_blocks(spec: ModelSpec, parts: list[Part]) -> Tensor:
    """Hidden states of all windows behind the last block of what came out."""
    tables = RotaryTables(spec, 32)
    dense = {
        name: weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        for name, weight in parts[0].weights.items()
    }
    hidden = embed(spec.embedding, dense, torch.from_numpy(np.stack(WINDOWS)))
    for block, part in zip(spec.blocks, parts[1:-1], strict=True):

        def apply(linear, x, part=part):
            return quantized_apply(part.weights, linear, x)

        hidden = block_forward(block, part.weights, hidden, tables.turn(block, 0, 32), apply=apply)
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_out_is_nearer_to_the_float_model_than_behind_gptq(family: str):
    spec = spec_of(CASES[case_named(family)])
    exact, gptq, learnt = (
        behind_blocks(spec, parts)
        for parts in (parts_of(spec, Gptq(), "w8a16"), parts_of(spec, Gptq()), parts_of(spec, Reconstruct()))
    )
    assert (learnt - exact).square().sum() < (gptq - exact).square().sum()


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-sym", "w8a8"])
def test_layers_say_that_they_learnt_and_have_the_error_of_what_they_are(scheme: str):
    spec = spec_of(CASES[case_named("llama")])
    saved = random_weights(spec)
    parts = parts_of(spec, Reconstruct(), scheme)
    blocks = [layer for part in parts[1:-1] for layer in part.layers]
    weights = {name: weight for part in parts[1:-1] for name, weight in part.weights.items()}
    assert scheme == "w8a8" or any(layer.method == "gptq+reconstruct" for layer in blocks)
    assert {layer.method for layer in blocks} <= {"gptq", "gptq+reconstruct"}
    tensors = {linear.name: linear.weight for linear in spec.linears()}
    for layer in blocks:
        error = weights[f"{layer.name}.weight"].relative_error(saved.read(tensors[layer.name]))
        assert layer.relative_error == pytest.approx(error)


def test_a_block_that_learns_nothing_good_stays_as_it_was(monkeypatch):
    far = replace(LEARNING, rates=Rates(offset=0.0, scale=0.5))
    monkeypatch.setattr(parts_module, "Reconstruction", lambda one, rule: Reconstruction(one, rule, far))
    spec = spec_of(CASES[case_named("llama")])
    found, expected = parts_of(spec, Reconstruct()), parts_of(spec, Gptq())
    assert [layer for part in found for layer in part.layers] == [layer for part in expected for layer in part.layers]
    assert torch.equal(behind_blocks(spec, found), behind_blocks(spec, expected))


def test_processes_that_divide_the_windows_learn_the_same():
    spec = spec_of(CASES[case_named("llama")])
    alone = parts_of(spec, Reconstruct())
    both = together(2, lambda ranks: parts_of(spec, Reconstruct(), ranks=ranks))
    for first, second in zip(*both, strict=True):
        assert first.layers == second.layers
    assert torch.allclose(behind_blocks(spec, both[0]), behind_blocks(spec, both[1]))
    exact = behind_blocks(spec, parts_of(spec, Gptq(), "w8a16"))
    errors = [float((behind_blocks(spec, parts) - exact).square().sum()) for parts in (alone, both[0])]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
