"""What a scan sees is what the model computes, window by window, and what 16 bits make of it."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from llmopt.engine.blocks import RotaryTables, block_forward, embed, plain
from llmopt.errors import ModelError
from llmopt.model.spec import Linear
from llmopt.pipeline.parts import PartReader
from llmopt.pipeline.scan import Scan, ranges_from_bytes, ranges_to_bytes
from llmopt.precision.cast import Ranges
from llmopt.progress import Silent
from tests.decoders import assignments
from tests.families import CASES, Saved, random_weights, spec_of

WINDOWS = [np.random.default_rng(seed).integers(0, 97, 20) for seed in range(3)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More would wait for each other, over matrices as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scanned(case: str, saved: Saved, dtype: torch.dtype = torch.float16) -> Ranges:
    spec = spec_of(CASES[case])
    return Scan(spec, WINDOWS, dtype).run(PartReader(spec, saved, assignments(spec, lambda name: None), None), Silent())


@pytest.mark.parametrize("case", ["llama", "gemma3", "gpt2", "opt", "qwen3"])
def test_ranges_are_those_of_the_model(case: str) -> None:
    spec = spec_of(CASES[case])
    saved = random_weights(spec)
    found = scanned(case, saved)
    tables = RotaryTables(spec, 20)
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    residual = []
    hidden = [embed(spec.embedding, saved.tensors, torch.from_numpy(ids)[None]) for ids in WINDOWS]
    assert found.embedded == max(float(one.abs().max()) for one in hidden)
    for block in spec.blocks:

        def apply(linear: Linear, x: Tensor) -> Tensor:
            inputs.setdefault(linear.name, []).append(x)
            outputs.setdefault(linear.name, []).append(plain(saved.tensors)(linear, x))
            return outputs[linear.name][-1]

        hidden = [block_forward(block, saved.tensors, one, tables.turn(block, 0, 20), apply=apply) for one in hidden]
        residual.append(max(float(one.abs().max()) for one in hidden))
    assert [behind for _, behind in found.residual] == pytest.approx(residual, rel=1e-5)
    for name, read in inputs.items():
        seen, largest_output = found.modules[name], max(float(y.abs().max()) for y in outputs[name])
        assert seen.largest_input == pytest.approx(max(float(x.abs().max()) for x in read), rel=1e-5), name
        assert seen.largest_output == pytest.approx(largest_output, rel=1e-5), name


def test_the_error_is_that_of_everything_in_16_bits_token_by_token() -> None:
    spec = spec_of(CASES["llama"])
    saved = random_weights(spec)
    linear = spec.blocks[0].attention.inputs[1]
    entering: list[Tensor] = []

    def apply(one: Linear, x: Tensor) -> Tensor:
        if one == linear:
            entering.append(x)
        return plain(saved.tensors)(one, x)

    for ids in WINDOWS:
        hidden = embed(spec.embedding, saved.tensors, torch.from_numpy(ids)[None])
        turn = RotaryTables(spec, 20).turn(spec.blocks[0], 0, 20)
        block_forward(spec.blocks[0], saved.tensors, hidden, turn, apply=apply)
    weight, bias = saved.tensors[linear.weight.name], saved.tensors[f"{linear.name}.bias"]
    x_NI = torch.cat(entering, 1)[0]
    y_NO = x_NI @ weight.T + bias
    half_NO = (x_NI.half().float() @ weight.half().float().T + bias.half().float()).half().float()
    expected = float(((half_NO - y_NO).norm(dim=1) / y_NO.norm(dim=1)).square().mean().sqrt())
    assert scanned("llama", saved).modules[linear.name].error == pytest.approx(expected, rel=1e-3)
    assert scanned("llama", saved, torch.bfloat16).modules[linear.name].error > 4 * expected


def test_a_linear_that_overflows_loses_everything() -> None:
    spec = spec_of(CASES["llama"])
    saved = random_weights(spec)
    name = spec.blocks[0].mlp.down.weight.name
    tensors = {**saved.tensors, name: saved.tensors[name] * 1e6}
    seen = scanned("llama", Saved(tensors)).modules[name.removesuffix(".weight")]
    assert seen.largest_output > 65504
    assert seen.error == math.inf


def test_a_bias_counts_among_the_weights() -> None:
    spec = spec_of(CASES["opt"])
    saved = random_weights(spec)
    names = (spec.blocks[0].mlp.down.name, spec.blocks[1].mlp_norm.name)
    tensors = dict(saved.tensors)
    for name in names:
        tensors[f"{name}.bias"] = torch.full_like(tensors[f"{name}.bias"], -77.0)
    found = scanned("opt", Saved(tensors))
    assert [found.modules[name].largest_weight for name in names] == [77.0, 77.0]


def test_a_model_that_overflows_float32_is_named() -> None:
    spec = spec_of(CASES["llama"])
    saved = random_weights(spec)
    name = spec.blocks[1].mlp.down.weight.name
    with pytest.raises(ModelError) as caught:
        scanned("llama", Saved({**saved.tensors, name: torch.full_like(saved.tensors[name], 3e38)}))
    assert caught.value.where == "behind block 1"


def test_a_journal_gives_back_what_it_was_given() -> None:
    spec = spec_of(CASES["llama"])
    found = scanned("llama", random_weights(spec))
    found = dataclasses.replace(found, embedded=math.inf)
    assert ranges_from_bytes(ranges_to_bytes(found)) == found
