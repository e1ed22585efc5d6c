"""A folded block computes what it did; what is to stay as it is stays."""

import pytest
import torch
from torch import Tensor

from llmopt.engine.blocks import RotaryTables, block_forward
from llmopt.model.spec import Block, ModelSpec
from llmopt.pipeline import folding
from llmopt.pipeline.calibration import Calibration
from llmopt.pipeline.folding import fold_block, joints
from llmopt.pipeline.parts import PartReader
from llmopt.quantize.awq import Awq
from llmopt.quantize.fold import Scaling, Turning
from llmopt.quantize.rotate import random_rotation
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from tests.decoders import Saved, assignments
from tests.families import CASES, random_weights, spec_of
from tests.pipeline.test_calibration import WINDOWS

SCHEME = parse_scheme("w8a16")


def floats_of(block: Block, saved: Saved) -> dict[str, Tensor]:
    floats = {tensor.name: saved.read(tensor) for tensor in block.tensors()}
    for linear in block.linears():
        if linear.transposed:
            floats[linear.weight.name] = floats[linear.weight.name].T.contiguous()
    return floats


def outputs(spec: ModelSpec, block: Block, floats: dict[str, Tensor]) -> Tensor:
    hidden = torch.randn((1, 24, block.attention_norm.size), generator=torch.Generator().manual_seed(0))

    def apply(linear, x):
        bias = floats[f"{linear.name}.bias"] if linear.bias else None
        return torch.nn.functional.linear(x, floats[linear.weight.name], bias)

    turn = RotaryTables(spec, 24).turn(block, 0, 24)
    return block_forward(block, floats, hidden, turn, apply=apply)


def drawn_scales(linears, heads) -> Scaling:
    scales_I = torch.randn(linears[0].weight_OI.shape[1], generator=torch.Generator().manual_seed(1)).exp()
    return Scaling.shared(scales_I, heads)


def drawn_turn(linears, heads) -> Turning | None:
    if heads is None:
        return None
    channels = linears[0].weight_OI.shape[1] // (heads[0] * heads[1])
    return Turning(random_rotation(channels, torch.Generator().manual_seed(1)))


@pytest.fixture
def draw(monkeypatch):
    """Has changes drawn at random, as if they were the best."""

    def begin(change) -> None:
        monkeypatch.setattr(folding, "best_change", lambda fold, linears, inputs, heads=None: change(linears, heads))

    return begin


@pytest.mark.parametrize("change", [drawn_scales, drawn_turn])
@pytest.mark.parametrize("case", CASES)
def test_a_folded_block_computes_the_same(case, change, draw):
    draw(change)
    spec = spec_of(CASES[case])
    for block in spec.blocks[:2]:
        floats = floats_of(block, random_weights(spec))
        before = outputs(spec, block, floats)
        unfolded = dict(floats)
        readers = {joint.readers[0].name: None for joint in joints(block)}
        gained = fold_block(Awq(), block, floats, readers, lambda linear: SCHEME)
        changed = [joint for joint in joints(block) if change is drawn_scales or joint.heads is not None]
        assert set(gained) == {linear.name for joint in changed for linear in joint.readers}
        assert not any(torch.equal(floats[f"{name}.weight"], unfolded[f"{name}.weight"]) for name in gained)
        assert torch.allclose(outputs(spec, block, floats), before, rtol=1e-3, atol=1e-4)


def test_nothing_passes_through_a_gelu():
    gpt2 = spec_of(CASES["gpt2"]).blocks[0]
    llama = spec_of(CASES["llama"]).blocks[0]
    assert gpt2.mlp.down not in {linear for joint in joints(gpt2) for linear in joint.readers}
    assert llama.mlp.down in {linear for joint in joints(llama) for linear in joint.readers}


def test_a_linear_that_stays_float_keeps_its_weight_and_its_inputs(draw):
    draw(drawn_scales)
    spec = spec_of(CASES["llama"])
    block = spec.blocks[0]
    floats = floats_of(block, random_weights(spec))
    before = dict(floats)
    left = {block.attention.inputs[-1].name, block.mlp.down.name}
    readers = {joint.readers[0].name: None for joint in joints(block)}
    gained = fold_block(Awq(), block, floats, readers, lambda linear: None if linear.name in left else SCHEME)
    assert set(gained) == {linear.name for linear in block.mlp.inputs}
    for name in (*(f"{name}.weight" for name in left), f"{block.attention_norm.name}.weight"):
        assert torch.equal(floats[name], before[name])


def test_parts_come_folded_and_say_so():
    spec = spec_of(CASES["llama"])
    saved = random_weights(spec)
    given = assignments(spec, lambda name: "w4a16")
    reader = PartReader(spec, saved, given, Rtn(), Calibration(spec, WINDOWS), folds=(Awq(),))
    reader.embedding()
    layers = [layer for part in reader.blocks() for layer in part.layers]
    assert {layer.method for layer in layers} == {"rtn", "awq+rtn"}
    assert all(layer.relative_error < 0.2 for layer in layers)
