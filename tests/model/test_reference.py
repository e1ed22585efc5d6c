"""The reference model leaves the 4-bit grid that it comes on, and computes what it computed there."""

from pathlib import Path

import torch

from llmopt.model.source import open_source
from llmopt.model.spec import ModelSpec
from tests.reference import NAME, leave_grid, reference_model


def products(weights: dict[str, torch.Tensor], prefix: str, heads: int, groups: int) -> dict[str, torch.Tensor]:
    """What the model's output depends on: weights as their inputs reach them, down to the products of linear pairs."""
    layer = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    norms = {
        "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    }
    result = {
        linear: layer[f"{linear}.weight"] * layer[f"{norm}.weight"]
        for norm, linears in norms.items()
        for linear in linears
    }
    # Channel by channel, since the gate stands between up and down.
    up_IH, down_HI = result.pop("mlp.up_proj"), layer["mlp.down_proj.weight"]
    result["down after up"] = torch.einsum("ih,oi->oih", up_IH, down_HI)
    v_KDH = (layer["self_attn.v_proj.weight"] * layer["input_layernorm.weight"]).unflatten(0, (heads // groups, -1))
    output_OKGD = layer["self_attn.o_proj.weight"].unflatten(1, (heads // groups, groups, -1))
    result["output after v"] = torch.einsum("kdh,okgd->okgh", v_KDH, output_OKGD)
    return result


def test_leaving_the_grid_changes_no_product(spec: ModelSpec, weights: dict[str, torch.Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in weights.items()}
    leave_grid(spec.blocks[1], weights, torch.Generator().manual_seed(7))
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert changed == {tensor.name for tensor in spec.blocks[1].tensors()}

    old, new = (products(tensors, "model.layers.1.", heads=2, groups=2) for tensors in (before, weights))
    for name, product in old.items():
        torch.testing.assert_close(new[name], product, msg=name)


def test_the_factors_stay_within_a_quarter(spec: ModelSpec, weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.input_layernorm.weight"
    before = weights[name].clone()
    leave_grid(spec.blocks[0], weights, torch.Generator().manual_seed(7))
    factors = before / weights[name]
    assert 0.79 < factors.min() < 0.95
    assert 1.05 < factors.max() < 1.26


def test_a_model_that_was_made_is_not_made_again(folder: Path) -> None:
    folder.rename(folder.parent / NAME)
    assert open_source(str(reference_model(folder.parent))).spec.family == "llama"
