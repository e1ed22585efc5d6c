"""Damaged and hostile safetensors files are refused by name, before any weight is read."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.errors import ModelError
from llmopt.model.safetensors_files import INDEX, read_table, read_tables, weight_files

HEADER = {
    "first": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "second": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]},
}


def write(path: Path, header: dict[str, Any] | bytes, data_bytes: int = 24) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    return path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard(folder: Path) -> dict[str, str]:
    """Split the folder's one file in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    write_index(folder, weight_map)
    return weight_map


def test_a_table_says_where_each_tensor_lies(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    table = read_table(tmp_path / "model.safetensors")
    assert {name: (stored.shape, stored.dtype, stored.size_bytes) for name, stored in table.items()} == {
        "a": ((2, 3), "F32", 24),
        "b": ((5,), "BF16", 10),
    }
    raw = (tmp_path / "model.safetensors").read_bytes()[table["a"].offset :][:24]
    assert raw == tensors["a"].numpy().tobytes()


def test_a_cut_off_file_names_the_tensor_that_it_lacks(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", HEADER, data_bytes=20)
    with pytest.raises(ModelError, match=r"second ends at byte \d+, and the file has \d+") as caught:
        read_table(path)
    assert caught.value.where == str(path)
    assert "not fully downloaded" in str(caught.value.hint)


@pytest.mark.parametrize("size_bytes", [0, 5, 8, 40])
def test_a_file_cut_off_in_its_header_is_refused(tmp_path: Path, size_bytes: int) -> None:
    path = write(tmp_path / "x.safetensors", HEADER)
    path.write_bytes(path.read_bytes()[:size_bytes])
    with pytest.raises(ModelError, match="its header is said to have"):
        read_table(path)


def test_a_header_larger_than_the_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match=f"{1 << 60} bytes, and the file has 10"):
        read_table(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": {**HEADER["first"], "data_offsets": [0, 12]}}, "first has 12 bytes, where F32 .* takes 16"),
        ({"first": {**HEADER["first"], "data_offsets": [16, 0]}}, "first makes no sense"),
        ({"first": {**HEADER["first"], "data_offsets": [-16, 0]}}, "first makes no sense"),
        ({"first": {**HEADER["first"], "shape": [-2, -2]}}, "first makes no sense"),
        ({"first": {"dtype": "F32"}}, "entry for first cannot be read"),
        ({"first": 7}, "entry for first cannot be read"),
        ({"second": {**HEADER["second"], "data_offsets": [8, 16]}}, "second overlaps another tensor"),
        ({"second": {**HEADER["second"], "data_offsets": [20, 28]}}, "second leaves a gap before it"),
        ({"second": {**HEADER["second"], "data_offsets": [1 << 40, (1 << 40) + 8]}}, "second leaves a gap"),
        ({"second": {"dtype": "F32", "shape": [0], "data_offsets": [16, 16]}}, "8 bytes behind the last tensor"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_table(write(tmp_path / "x.safetensors", HEADER | change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"a": ', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
    ],
)
def test_a_header_that_is_not_one_json_object_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_table(write(tmp_path / "x.safetensors", text))


def test_a_git_lfs_pointer_is_recognized(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 538090408\n")
    with pytest.raises(ModelError, match="git-lfs pointer") as caught:
        read_table(path)
    assert caught.value.hint == "run git lfs pull"


def test_shards_are_read_as_one_checkpoint(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    weight_map = shard(folder)
    tables = read_tables(folder)
    assert {name: stored.file.name for name, stored in tables.items()} == weight_map
    assert tables.keys() == weights.keys()


def test_an_index_that_names_a_missing_file_is_refused(folder: Path) -> None:
    shard(folder)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"'model-2\.safetensors' is missing"):
        read_tables(folder)


def test_an_index_that_puts_a_tensor_into_the_wrong_file_is_refused(folder: Path) -> None:
    weight_map = shard(folder)
    write_index(folder, weight_map | {"lm_head.weight": "model-2.safetensors", "another": "model-1.safetensors"})
    with pytest.raises(ModelError, match=r"model-2\.safetensors holds lm_head\.weight, and it does not"):
        read_tables(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}])
def test_an_index_without_a_map_to_files_is_refused(folder: Path, weight_map: object) -> None:
    write_index(folder, weight_map)
    with pytest.raises(ModelError, match="no weight_map"):
        read_tables(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "{root}/outside.safetensors", "link.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(folder: Path, name: str) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    (folder / "link.safetensors").symlink_to(outside)
    write_index(folder, {"lm_head.weight": name.format(root=folder.parent)})
    with pytest.raises(ModelError, match="lies outside the model's folder"):
        read_tables(folder)


def test_the_only_weight_file_cannot_be_a_link_out_of_its_folder(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "outside.safetensors")
    with pytest.raises(ModelError, match="lies outside the model's folder"):
        weight_files(folder)


def test_the_links_of_the_hub_cache_are_followed(folder: Path) -> None:
    snapshot = folder.parent / "hub" / "models--owner--name" / "snapshots" / "abc"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.move(folder / "model.safetensors", blobs / "0123")
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(blobs / "0123", snapshot))
    assert weight_files(snapshot) == (snapshot / "model.safetensors",)


def test_a_tensor_that_is_stored_twice_is_refused(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    weight_map = shard(folder)
    save_file(weights, folder / "model-2.safetensors")
    write_index(folder, weight_map)
    with pytest.raises(ModelError, match="is stored twice") as caught:
        read_tables(folder)
    assert "model-1.safetensors and" in str(caught.value.where)


def test_one_file_needs_no_particular_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch.safetensors")
    assert [path.name for path in weight_files(folder)] == ["pytorch.safetensors"]


def test_several_files_without_an_index_are_refused(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ModelError, match=r"2 safetensors files, and no model\.safetensors\.index\.json"):
        weight_files(folder)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no safetensors file"):
        weight_files(tmp_path)
