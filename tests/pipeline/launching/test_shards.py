"""Shards: each rank's own tensors in its own file, for one plan and no other."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llmopt.errors import ArtifactError, ModelError
from llmopt.model.source import open_source
from llmopt.partition.runtime.stage import DecoderStage
from llmopt.pipeline.launching.job import Job
from llmopt.pipeline.launching.shards import MANIFEST, materialize, require_shards
from llmopt.progress import Silent
from tests.forked import run_forked
from tests.partition.ranks import layout_of

LAYOUT = layout_of((1, 1), (3, 2))


@pytest.fixture
def shards(six_heads, tmp_path):
    folder = tmp_path / "shards"
    materialize(open_source(str(six_heads)), LAYOUT, "a" * 64, folder, Silent())
    return folder


def test_ranks_generate_the_same_from_their_shards_as_from_the_model(six_heads, shards, tmp_path):
    made = [
        run_forked(
            Job(
                model=model,
                shards=folder,
                plan_hash="a" * 64,
                layout=LAYOUT,
                ids_BT=((5, 9, 77),),
                output=3,
                keep_logits=True,
                timeout_s=30,
            ),
            tmp_path,
        )
        for model, folder in ((str(six_heads), None), ("not needed any more", str(shards)))
    ]
    assert torch.equal(made[0].ids_BT, made[1].ids_BT)
    assert torch.equal(made[0].logits_BTV, made[1].logits_BTV)


def test_a_shard_holds_what_its_rank_reads_and_nothing_else(six_heads, shards):
    spec = open_source(str(six_heads)).spec
    for rank in range(LAYOUT.size):
        held = load_file(shards / f"rank-{rank:05d}" / "model.safetensors")
        cuts = {cut.tensor.name: cut.shape for cut in DecoderStage.cuts(spec, LAYOUT, LAYOUT.seat(rank))}
        assert {name: tuple(values.shape) for name, values in held.items()} == cuts


def test_shards_of_this_plan_are_kept_and_those_of_another_are_refused(six_heads, shards):
    before = (shards / MANIFEST).stat().st_mtime_ns
    materialize(open_source(str(six_heads)), LAYOUT, "a" * 64, shards, Silent())
    assert (shards / MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="the shards are from another plan: aaaaaaaaaaaa…, and not bbbbbbbbbbbb…"):
        materialize(open_source(str(six_heads)), LAYOUT, "b" * 64, shards, Silent())


def test_a_missing_shard_is_named_with_its_rank_and_only_its_rank_misses_it(shards):
    (shards / "rank-00002" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"the shard of rank 2 \(stage 1\) is missing"):
        require_shards(shards, LAYOUT, "a" * 64)
    require_shards(shards, LAYOUT, "a" * 64, rank=1)


def test_a_shard_that_was_cut_off_is_refused(shards):
    path = shards / "rank-00000" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"the shard of rank 0 \(stage 0\) has [\d,]+ bytes, not [\d,]+"):
        require_shards(shards, LAYOUT, "a" * 64)


@pytest.mark.parametrize("change", [{"schema": "llmopt.shards/9"}, {"ranks": [{"file": "../model.safetensors"}]}])
def test_a_list_of_shards_that_says_something_else_is_refused(shards, change):
    path = shards / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match="no list of shards"):
        require_shards(shards, LAYOUT, "a" * 64)


def test_a_shard_in_the_place_of_another_is_refused(six_heads, tmp_path):
    layout, source = layout_of((1, 1), (2, 2), (1, 1)), open_source(str(six_heads))
    for name in "ab":
        materialize(source, layout, name * 64, tmp_path / name, Silent())
    first, second, other = (
        tmp_path / folder / f"rank-0000{rank}" / "model.safetensors" for folder, rank in (("a", 1), ("a", 2), ("b", 1))
    )
    assert first.stat().st_size == second.stat().st_size
    shutil.copyfile(second, first)
    with pytest.raises(ArtifactError, match=r"not the shard of rank 1 \(stage 1\), but that of rank 2 of this plan"):
        require_shards(tmp_path / "a", layout, "a" * 64)
    shutil.copyfile(other, first)
    with pytest.raises(ArtifactError, match="but that of rank 1 of another plan"):
        require_shards(tmp_path / "a", layout, "a" * 64)


def test_a_shard_without_a_header_is_refused(shards):
    path = shards / "rank-00000" / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ModelError, match="its header is said to have"):
        require_shards(shards, LAYOUT, "a" * 64)
