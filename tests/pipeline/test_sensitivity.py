"""The streamed estimate is that of derivatives through the whole model at once, and ranks layers as they are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llmopt.calibrate.text import built_in
from llmopt.calibrate.windows import windows
from llmopt.engine.blocks import RotaryTables, block_forward, embed, head_logits, normalize, plain
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.source import open_source
from llmopt.model.spec import Linear, ModelSpec
from llmopt.model.tokenizer import Tokenizer
from llmopt.pipeline.sensitivity import ROUNDING, SEARCH, Losses, Sensitivity
from llmopt.precision.fisher import Rows, draw_labels
from llmopt.precision.groups import CANDIDATES, Group, fused_groups
from llmopt.progress import Silent
from llmopt.quantize.method import InputStatistics
from llmopt.quantize.rtn import Rtn
from tests.families import CASES, Saved, random_weights, spec_of

FAMILIES = ["llama", "llama, tied, wide heads", "gpt2", "gemma3", "phi3", "opt"]
IDS_BT = np.random.default_rng(0).integers(0, 97, (3, 24))
SEED = 5


def streamed(spec: ModelSpec, saved: Saved, groups: tuple[Group, ...]) -> Mapping[Group, Losses]:
    return Sensitivity(spec, saved, groups, IDS_BT, SEED).measure(Silent())


@dataclass(frozen=True)
class Whole:
    """The model at once: for each window, and of all weights, ∂ Σ log p(label) / ∂w; and what enters the linears."""

    derivatives: list[Mapping[str, Tensor]]  # by checkpoint names; the table's by looking rows up alone
    inputs_NI: Mapping[str, Tensor]


def through_everything(spec: ModelSpec, saved: Saved) -> Whole:
    seen: dict[str, list[Tensor]] = {}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in saved.tensors.items()}

    def apply(linear: Linear, x: Tensor) -> Tensor:
        seen.setdefault(linear.name, []).append(x.detach()[0])
        return plain(leaves)(linear, x)

    tables, entering = RotaryTables(spec, IDS_BT.shape[1]), []
    for ids_T in torch.from_numpy(IDS_BT):
        hidden = embed(spec.embedding, leaves, ids_T[None])
        for block in spec.blocks:
            hidden = block_forward(block, leaves, hidden, tables.turn(block, 0, len(ids_T)), apply=apply)
        entering.append(hidden)
    # A tied head is given a copy, so that derivatives by the table are those of looking rows up.
    copied = {**leaves, spec.head.weight.name: saved.tensors[spec.head.weight.name]}
    logits = [head_logits(spec, copied, hidden)[0] for hidden in entering]
    labels = drawn(spec, saved, torch.cat(entering).detach())
    scores = [one.log_softmax(-1).gather(1, label[:, None]).sum() for one, label in zip(logits, labels, strict=True)]
    names = [name for name in leaves if name != spec.head.weight.name or spec.tied]
    found = [torch.autograd.grad(score, [leaves[name] for name in names], allow_unused=True) for score in scores]
    return Whole(
        derivatives=[dict(zip(names, one, strict=True)) for one in found],
        inputs_NI={name: torch.cat(windows) for name, windows in seen.items()},
    )


def drawn(spec: ModelSpec, saved: Saved, hidden_BTH: Tensor) -> Tensor:
    """The labels that are drawn with the seed, [B, T]."""
    x = normalize(spec.final_norm, saved.tensors, hidden_BTH).flatten(0, 1)
    rows = Rows(0, saved.tensors[spec.head.weight.name], saved.tensors.get(f"{spec.head.name}.bias"))
    return draw_labels(x, [rows], torch.Generator().manual_seed(SEED)).label_T.view(IDS_BT.shape)


def head_inputs(spec: ModelSpec, saved: Saved) -> Tensor:
    """What enters the head, [N, H]."""
    hidden, tables = embed(spec.embedding, saved.tensors, torch.from_numpy(IDS_BT)), RotaryTables(spec, IDS_BT.shape[1])
    for block in spec.blocks:
        hidden = block_forward(block, saved.tensors, hidden, tables.turn(block, 0, IDS_BT.shape[1]))
    return normalize(spec.final_norm, saved.tensors, hidden).flatten(0, 1)


def information(whole: Whole, name: str) -> Tensor:
    return sum(one[name].square() for one in whole.derivatives) / IDS_BT.size  # type: ignore[return-value]


def expected_losses(spec: ModelSpec, saved: Saved, whole: Whole, group: Group) -> list[float]:
    """½ Σ F ΔW² of a group of a block's linears."""
    linears = {linear.name: linear for linear in spec.linears()}

    def stacked(tensor_of: Callable[[str], Tensor]) -> Tensor:
        parts = [(linears[name], tensor_of(linears[name].weight.name)) for name in group.layers]
        return torch.cat([part.T if linear.transposed else part for linear, part in parts])

    weight = stacked(saved.tensors.__getitem__)
    fisher = stacked(lambda name: information(whole, name))
    x = whole.inputs_NI[group.layers[0]]
    inputs = InputStatistics(tokens=len(x), second_moment_II=x.T @ x / len(x))
    losses = []
    for scheme in group.candidates:
        assert scheme is not None
        method = ROUNDING if scheme.bits == 8 else SEARCH
        error = weight - method.quantize(weight, scheme, inputs).dequantize()
        losses.append(float((fisher * error.square()).sum()) / 2)
    return losses


@pytest.mark.parametrize("case", FAMILIES)
def test_the_losses_of_blocks_are_those_of_derivatives_through_the_whole_model(case: str) -> None:
    spec = spec_of(CASES[case])
    saved, groups = random_weights(spec), fused_groups(spec, {})
    losses = streamed(spec, saved, groups)
    assert set(losses) == set(groups)
    tables = {spec.embedding.name, spec.head.name}
    whole = through_everything(spec, saved)
    of_blocks = [group for group in groups if not tables & set(group.layers)]
    for group in of_blocks[:4] + of_blocks[-4:]:
        assert losses[group] == pytest.approx(expected_losses(spec, saved, whole, group), rel=2e-3)


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_the_losses_of_a_table_are_those_of_the_rows_that_are_looked_up(case: str) -> None:
    spec = spec_of(CASES[case])
    saved = random_weights(spec)
    (embedding, *_, head) = fused_groups(spec, {})
    table = saved.tensors[f"{spec.embedding.name}.weight"]
    whole = through_everything(spec, saved)
    x = head_inputs(spec, saved)
    head_bias = saved.tensors.get(f"{spec.head.name}.bias")
    p = torch.nn.functional.linear(x, saved.tensors[spec.head.weight.name], head_bias).softmax(-1)
    fisher = information(whole, f"{spec.embedding.name}.weight")
    expected = []
    for scheme in CANDIDATES:
        error = table - ROUNDING.quantize(table, scheme).dequantize()
        lookups = float((fisher * error.square()).sum()) / 2
        as_head = float((p * (1 - p) * (x.square() @ error.square().T)).sum(-1).mean()) / 2
        expected.append(lookups + (as_head if spec.tied else 0.0))
    losses = streamed(spec, saved, fused_groups(spec, {}))
    assert spec.tied == (head.layers != (spec.head.name,))
    assert losses[embedding] == pytest.approx(expected, rel=2e-3)


def test_float_loses_nothing_and_a_fixed_scheme_what_it_loses_as_a_candidate() -> None:
    spec = spec_of(CASES["llama"])
    saved = random_weights(spec)
    float_name, fixed_name = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
    fixed = streamed(spec, saved, fused_groups(spec, {float_name: None, fixed_name: CANDIDATES[3]}))
    free = streamed(spec, saved, fused_groups(spec, {}))
    by_name = [{group.name: losses for group, losses in found.items()} for found in (fixed, free)]
    assert by_name[0][float_name] == (0.0,)
    assert by_name[0][fixed_name] == pytest.approx((by_name[1][fixed_name][3],))


def test_each_tensor_of_a_block_is_read_once_on_each_way() -> None:
    spec = spec_of(CASES["llama"])
    saved, read = random_weights(spec), []

    class Noting(Saved):
        def read(self, tensor):  # type: ignore[no-untyped-def]
            read.append(tensor.name)
            return super().read(tensor)

    streamed(spec, Noting(saved.tensors), fused_groups(spec, {}))
    blocks = [int(name.split(".")[2]) for name in read if ".layers." in name]
    order = [index for position, index in enumerate(blocks) if position == 0 or blocks[position - 1] != index]
    assert order == [0, 1, 2, 1, 0]
    assert {read.count(name) for name in read if ".layers." in name} == {2}


@pytest.fixture(scope="module")
def demo() -> tuple[ModelSpec, dict[str, Tensor], np.ndarray, np.ndarray]:
    """The embedded model, and windows of text to estimate and to measure on."""
    source = open_source("demo", revision=None, trust_remote_code=False, progress=Silent())
    assert source.folder is not None
    text = windows(built_in("calibration"), Tokenizer.from_folder(Path(source.folder)), 256, 14 * 256)
    with open_checkpoint(source) as checkpoint:
        tensors = {tensor.name: checkpoint.read(tensor) for tensor in source.spec.tensors()}
    return source.spec, tensors, np.stack(text.ids[:10]), np.stack(text.ids[10:])


def test_predicted_losses_rank_groups_as_measured_ones_do_and_have_their_size(demo) -> None:  # type: ignore[no-untyped-def]
    spec, tensors, estimated_on_BT, measured_on_BT = demo
    groups = fused_groups(spec, {})
    losses = Sensitivity(spec, Saved(tensors), groups, estimated_on_BT, 0).measure(Silent())
    ids, turns = torch.from_numpy(measured_on_BT), RotaryTables(spec, 256)

    def log_p(weights: Mapping[str, Tensor]) -> Tensor:
        hidden = embed(spec.embedding, weights, ids)
        for block in spec.blocks:
            hidden = block_forward(block, weights, hidden, turns.turn(block, 0, 256))
        return head_logits(spec, weights, hidden).log_softmax(-1)

    index = 2
    scheme, predicted, measured = CANDIDATES[index], [], []
    with torch.inference_mode():
        before = log_p(tensors)
        for group in groups:
            names = [f"{layer}.weight" for layer in group.layers if f"{layer}.weight" in tensors]
            changed = {name: Rtn().quantize(tensors[name], scheme).dequantize() for name in names}
            measured.append(float((before.exp() * (before - log_p({**tensors, **changed}))).sum(-1).mean()))
            predicted.append(losses[group][index])
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, measured)]
    assert np.corrcoef(*ranks)[0, 1] > 0.8
    assert sum(measured) / 2 < sum(predicted) < sum(measured) * 2
