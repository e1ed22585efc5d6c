"""Shards: what each rank of a plan holds, as files of its own, so that a machine needs no more than its ranks do.

    DIR/  config.json  shards.json  rank-00000/model.safetensors  rank-00001/model.safetensors …

`shards.json` names the plan by its hash: shards of another plan are refused and never read.
"""

import json
import math
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.artifact import staged, write_json
from llmopt.errors import ArtifactError
from llmopt.export.checkpoint.files import Entry, SafetensorsFiles
from llmopt.model.checkpoint import Checkpoint, open_checkpoint
from llmopt.model.decode import decode
from llmopt.model.safetensors_files import read_tables
from llmopt.model.source import CONFIG, ModelSource
from llmopt.model.stored import damaged, open_file
from llmopt.partition.runtime.cut import Cut
from llmopt.partition.runtime.layout import Layout
from llmopt.partition.runtime.stage import DecoderStage
from llmopt.progress import Progress

MANIFEST = "shards.json"
SCHEMA = "llmopt.shards/1"
_WITHOUT_LOSS = {"BF16": torch.bfloat16, "F16": torch.float16}
_AGAIN = "remove the folder, and llmopt launch PLAN --materialize writes it again"


def materialize(source: ModelSource, layout: Layout, plan_hash: str, folder: Path, progress: Progress) -> None:
    """Write the shards of a plan, one tensor in memory at a time; what is there already from this plan is kept.

    Raises:
        ArtifactError: shards of another plan, or something else, are in the folder.
    """
    if (folder / MANIFEST).exists():
        require_shards(folder, layout, plan_hash)
        return
    with staged(folder, force=False) as partial, open_checkpoint(source) as checkpoint:
        files = []
        with progress.task("writing shards", total=layout.size) as task:
            for rank in range(layout.size):
                files.append(_write(checkpoint, source, layout, rank, partial))
                task.advance()
        write_json(partial / CONFIG, source.config)
        for path in source.tokenizer_files():
            shutil.copyfile(path, partial / path.name)
        write_json(partial / MANIFEST, {"schema": SCHEMA, "plan": plan_hash, "model": source.name, "ranks": files})


def require_shards(folder: Path, layout: Layout, plan_hash: str, rank: int | None = None) -> None:
    """See that a folder has the shards of a plan, or that of one rank.

    Raises:
        ArtifactError: it holds none, those of another plan, or one is missing or has another size.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError("there are no shards", where=str(folder), hint="llmopt launch PLAN --materialize DIR")
    manifest = _read(path)
    if manifest["plan"] != plan_hash:
        raise ArtifactError(
            f"the shards are from another plan: {manifest['plan'][:12]}…, and not {plan_hash[:12]}…",
            where=str(path),
            hint="name another folder; each plan has its own",
        )
    for each in range(layout.size) if rank is None else (rank,):
        entry = manifest["ranks"][each]
        shard = folder / entry["file"]
        if not shard.is_file():
            raise ArtifactError(f"the shard of {layout.name(each)} is missing", where=str(shard), hint=_AGAIN)
        if shard.stat().st_size != entry["bytes"]:
            what = f"the shard of {layout.name(each)} has {shard.stat().st_size:,} bytes, not {entry['bytes']:,}"
            raise ArtifactError(what, where=str(shard), hint=_AGAIN)


class Shard:
    """The tensors of one rank, cut already. Bytes are read, not mapped, as `llmopt.model.checkpoint` does.

    Raises:
        ArtifactError: see `require_shards`.
    """

    def __init__(self, folder: Path, layout: Layout, plan_hash: str, rank: int) -> None:
        require_shards(folder, layout, plan_hash, rank)
        self._stored = read_tables((folder / _name(rank)).parent)

    def read(self, cut: Cut) -> Tensor:
        """The values of a cut, float32."""
        stored = self._stored[cut.tensor.name]
        assert stored.shape == cut.shape, cut.tensor.name
        raw_RB = torch.empty((stored.rows, stored.row_bytes), dtype=torch.uint8)
        wanted = memoryview(raw_RB.numpy().reshape(-1).data)
        with open_file(stored.file) as file:
            file.seek(stored.offset)
            while count := file.readinto(wanted):  # at most 2 GiB at a time
                wanted = wanted[count:]
        if wanted:
            raise damaged(f"{stored.name} is cut off", stored.file)
        return decode(raw_RB, stored.dtype).reshape(stored.shape)


def _write(checkpoint: Checkpoint, source: ModelSource, layout: Layout, rank: int, folder: Path) -> dict[str, Any]:
    cuts = list(DecoderStage.cuts(source.spec, layout, layout.seat(rank)))
    entries = {cut.tensor.name: Entry(cut.tensor.name, _dtype(checkpoint, cut), cut.shape) for cut in cuts}
    path = folder / _name(rank)
    path.parent.mkdir()
    with closing(SafetensorsFiles(path.parent, entries.values(), shard_bytes=math.inf)) as files:
        for cut in cuts:
            files.write(cut.tensor.name, cut.read(checkpoint).to(entries[cut.tensor.name].dtype))
        files.save()
    return {"file": _name(rank), "bytes": path.stat().st_size}


def _dtype(checkpoint: Checkpoint, cut: Cut) -> torch.dtype:
    return _WITHOUT_LOSS.get(checkpoint.stored_dtype(cut.tensor), torch.float32)


def _name(rank: int) -> str:
    return f"rank-{rank:05d}/model.safetensors"


def _read(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema"] == SCHEMA and isinstance(manifest["plan"], str):
            files = [entry["file"] for entry in manifest["ranks"]]
            if files == [_name(rank) for rank in range(len(files))]:
                return dict(manifest)
    except (ValueError, KeyError, TypeError):
        pass
    raise ArtifactError("this is no list of shards that this llmopt knows", where=str(path), hint=_AGAIN)
