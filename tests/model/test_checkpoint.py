"""A checkpoint gives the numbers that were saved, or says which tensor it cannot give and why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmopt.errors import ModelError, UnsupportedError
from llmopt.model import checkpoint as checkpoint_module
from llmopt.model import decode
from llmopt.model.checkpoint import Checkpoint, open_checkpoint
from llmopt.model.source import ModelSource, open_source
from llmopt.model.spec import TensorSpec

Weights = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = TensorSpec("model.embed_tokens.weight", (24, 8))


def saved(folder: Path, weights: Weights, **config: Any) -> ModelSource:
    save_file(weights, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return open_source(str(folder))


def everything(opened: Checkpoint, source: ModelSource) -> Weights:
    return {tensor.name: opened.read(tensor) for tensor in source.spec.tensors()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_type_is_read_as_float32(folder: Path, weights: Weights, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    source = saved(folder, stored)
    with open_checkpoint(source) as opened:
        read = everything(opened, source)
        assert opened.stored_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert read.keys() == stored.keys()
    for name, tensor in read.items():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert torch.equal(tensor, stored[name].float()), name


def test_the_stored_type_is_told(folder: Path, weights: Weights) -> None:
    source = saved(folder, weights | {UP: weights[UP].half()})
    with open_checkpoint(source) as opened:
        assert opened.stored_dtype(TensorSpec(UP, (12, 8))) == "F16"
        assert opened.stored_dtype(EMBEDDING) == "F32"


def test_rows_are_those_of_the_whole(folder: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "_DECODED_AT_ONCE", 24)  # three rows of eight
    with open_checkpoint(saved(folder, weights)) as opened:
        assert torch.equal(opened.read(EMBEDDING), weights[EMBEDDING.name])
        assert torch.equal(opened.read_rows(EMBEDDING, 5, 19), weights[EMBEDDING.name][5:19])
        assert torch.equal(opened.read_rows(EMBEDDING, 23, 24), weights[EMBEDDING.name][23:])


def test_rows_come_without_the_rest_of_the_table(folder: Path, weights: Weights) -> None:
    """A wrong value in a row that nobody asked for is not seen: the row was not read."""
    weights[EMBEDDING.name][0, 0] = torch.inf
    with open_checkpoint(saved(folder, weights)) as opened:
        assert torch.equal(opened.read_rows(EMBEDDING, 1, 24), weights[EMBEDDING.name][1:])


def test_a_closed_checkpoint_keeps_no_file_open(folder: Path, weights: Weights) -> None:
    source = saved(folder, weights)
    with open_checkpoint(source) as opened:
        everything(opened, source)
        files = list(opened._files._files.values())
    assert files
    assert all(file.closed for file in files)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_refused(folder: Path, weights: Weights, value: float, dtype: torch.dtype) -> None:
    weights[UP] = weights[UP].to(dtype)
    weights[UP][7, 3] = value
    weights[UP][9, 0] = torch.nan
    with (
        open_checkpoint(saved(folder, weights)) as opened,
        pytest.raises(
            ModelError, match=r"up_proj\.weight holds NaN or infinity: 2 of 96 values, the first at \[7, 3\]"
        ),
    ):
        opened.read(TensorSpec(UP, (12, 8)))


def test_the_first_wrong_value_is_found_whatever_is_checked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_CHECKED_AT_ONCE", 7)
    values = torch.zeros(6, 5)
    decode.require_finite(values, name="a", file="f")
    values[3, 4] = values[5, 1] = torch.nan
    with pytest.raises(ModelError, match=r"2 of 30 values, the first at \[13, 4\]"):
        decode.require_finite(values, name="a", file="f", first_row=10)


def test_a_missing_tensor_is_named(folder: Path, weights: Weights) -> None:
    del weights[UP], weights["lm_head.weight"]
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight and 1 more") as caught:
        open_checkpoint(saved(folder, weights))
    assert caught.value.where == str(folder)


def test_a_wrong_shape_is_named(folder: Path, weights: Weights) -> None:
    weights[UP] = weights[UP].T.contiguous()
    with pytest.raises(ModelError, match=r"up_proj\.weight has shape \[8, 12\], where the config asks for \[12, 8\]"):
        open_checkpoint(saved(folder, weights))


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_type_that_is_not_a_weight_is_refused(folder: Path, weights: Weights, dtype: torch.dtype, name: str) -> None:
    weights[UP] = weights[UP].to(dtype)
    with pytest.raises(UnsupportedError, match=rf"up_proj\.weight is stored as {name}"):
        open_checkpoint(saved(folder, weights))


def test_what_the_model_does_not_need_is_listed(folder: Path, weights: Weights) -> None:
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "mask": torch.ones(2, dtype=torch.bool)}
    with open_checkpoint(saved(folder, weights | buffers)) as opened:
        assert opened.ignored == ("mask", "model.layers.0.self_attn.rotary_emb.inv_freq")
        assert opened.unknown == ("mask",)


def test_a_tied_head_may_be_stored_once_more(folder: Path, weights: Weights) -> None:
    source = saved(folder, weights, tie_word_embeddings=True)
    with open_checkpoint(source) as opened:
        assert opened.ignored == ("lm_head.weight",)
        assert opened.unknown == ()
        assert torch.equal(opened.read(source.spec.head.weight), weights[EMBEDDING.name])


@pytest.mark.parametrize(
    "rename",
    [lambda name: name.removeprefix("model."), lambda name: name if name.startswith("model.") else f"model.{name}"],
    ids=["left out", "everywhere"],
)
def test_the_prefix_of_the_base_model_is_optional(folder: Path, weights: Weights, rename: Callable[[str], str]) -> None:
    source = saved(folder, {rename(name): tensor for name, tensor in weights.items()})
    with open_checkpoint(source) as opened:
        read = everything(opened, source)
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_a_tensor_with_and_without_prefix_is_refused(folder: Path, weights: Weights) -> None:
    source = saved(folder, weights | {UP.removeprefix("model."): weights[UP].clone()})
    with pytest.raises(ModelError, match="are the same tensor"):
        open_checkpoint(source)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(folder: Path, weights: Weights) -> None:
    source = saved(folder, weights)
    path = folder / "model.safetensors"
    with open_checkpoint(source) as opened:
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ModelError, match="is cut off"):
            everything(opened, source)
