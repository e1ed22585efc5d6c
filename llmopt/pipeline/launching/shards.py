"""Shards: what each rank of a plan holds, as files of its own, so that a machine needs no more than its ranks do.

    DIR/  config.json  shards.json  rank-00000/model.safetensors  rank-00001/model.safetensors …

`shards.json` names the plan by its hash: shards of another plan are refused and never read. Integers are laid out as in
the model that they are from, each rank's share as if it were a whole weight.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from llmopt.artifact import staged, write_json
from llmopt.errors import ArtifactError, UnsupportedError
from llmopt.export.checkpoint.compressed_tensors import CompressedTensors
from llmopt.export.checkpoint.files import Entry, SafetensorsFiles
from llmopt.export.checkpoint.packed import PackedWeights
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.decode import decode
from llmopt.model.safetensors_files import read_metadata, read_tables
from llmopt.model.source import CONFIG, ModelSource
from llmopt.model.spec import Linear
from llmopt.model.stored import OpenFiles
from llmopt.partition.runtime.cut import Cut
from llmopt.partition.runtime.layout import Layout
from llmopt.partition.runtime.stage import DecoderStage
from llmopt.pipeline.launching.reading import AsStored, sound
from llmopt.pipeline.stored import Format, Schemes, stored_format
from llmopt.pipeline.stored_weights import Floats, StoredWeights, open_stored
from llmopt.progress import Progress
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

MANIFEST = "shards.json"
SCHEMA = "llmopt.shards/1"
_PLAN, _RANK = "llmopt.plan", "llmopt.rank"  # what a file says itself, for it may be put in another's place
_WITHOUT_LOSS = {"BF16": torch.bfloat16, "F16": torch.float16}
_AGAIN = "remove the folder, and llmopt launch PLAN --materialize writes it again"


def materialize(
    source: ModelSource,
    layout: Layout,
    plan_hash: str,
    folder: Path,
    progress: Progress,
    *,
    schemes: Schemes | None = None,
) -> None:
    """Write the shards of a plan, one tensor in memory at a time; what is there already from this plan is kept.

    `schemes` are those that the model's weights are stored in; None: it is one of floats.

    Raises:
        UnsupportedError: shards cannot hold its weights.
        ArtifactError: shards of another plan, or something else, are in the folder.
    """
    if (folder / MANIFEST).exists():
        require_shards(folder, layout, plan_hash)
        return
    if source.spec.before_head is not None:
        what = "the model was turned into another basis, and shards have no place for the product that turns it back"
        raise UnsupportedError(what, hint="launch it without --materialize")
    with staged(folder, force=False) as partial, _opened(source, schemes) as weights:
        files = []
        with progress.task("writing shards", total=layout.size) as task:
            for rank in range(layout.size):
                cuts = DecoderStage.cuts(source.spec, layout, layout.seat(rank))
                files.append(_write([weights.share(cut) for cut in cuts], rank, partial, plan_hash))
                task.advance()
        write_json(partial / CONFIG, source.config)
        for path in source.tokenizer_files():
            shutil.copyfile(path, partial / path.name)
        made = {"schema": SCHEMA, "plan": plan_hash, "model": source.name, "stored": stored_format(source)}
        write_json(partial / MANIFEST, made | {"ranks": files})


def require_shards(folder: Path, layout: Layout, plan_hash: str, rank: int | None = None) -> None:
    """See that a folder has the shards of a plan, or that of one rank.

    Raises:
        ArtifactError: it holds none, those of another plan, or one is missing, has another size or is another's.
        ModelError: the header of one is damaged.
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
        said = read_metadata(shard)
        if said.get(_PLAN, plan_hash) != plan_hash or said.get(_RANK, str(each)) != str(each):
            what = f"this is not the shard of {layout.name(each)}, but that of rank {said.get(_RANK)} of "
            what += "this plan" if said.get(_PLAN) == plan_hash else "another plan"
            raise ArtifactError(what, where=str(shard), hint=_AGAIN)


def shards_format(folder: Path) -> Format | None:
    """The format of the integers that shards are from; None of floats.

    Raises:
        ArtifactError: there are no shards.
    """
    found = _read(folder / MANIFEST).get("stored")
    return found if found in get_args(Format) else None


class Shard:
    """The tensors of one rank, cut already; satisfies `Reading`. Bytes are read, not mapped, as of a checkpoint.

    Raises:
        ArtifactError: see `require_shards`.
    """

    def __init__(self, folder: Path, layout: Layout, plan_hash: str, rank: int) -> None:
        require_shards(folder, layout, plan_hash, rank)
        path = (folder / _name(rank)).parent
        self._stored, self._files = read_tables(path), OpenFiles()
        self._integers = PackedWeights(self._stored, where=str(path))

    def floats(self, cut: Cut) -> Tensor:
        """See `Reading`."""
        stored = self._stored[cut.tensor.name]
        assert stored.shape == cut.shape, cut.tensor.name
        raw_RB = torch.empty((stored.rows, stored.row_bytes), dtype=torch.uint8)
        self._files.fill(memoryview(raw_RB.numpy().reshape(-1).data), stored)
        return decode(raw_RB, stored.dtype).reshape(stored.shape)

    def quantized(self, cut: Cut, linear: Linear, scheme: Scheme) -> QuantizedWeight:
        """See `Reading`."""
        local = local_linear(cut, linear)
        self._integers.require(local, scheme)
        return sound(self._integers.read_integers(local, scheme), linear.name)

    def close(self) -> None:
        """Close its file. Reading again opens it again."""
        self._files.close()
        self._integers.close()


@dataclass(frozen=True, slots=True)
class _Share:
    """What a rank's file has of one tensor of the model."""

    entries: tuple[Entry, ...]
    read: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class _Weights:
    """A model, cut for shards. Floats are read from `floats`."""

    floats: Floats
    stored: StoredWeights | None = None

    def share(self, cut: Cut) -> _Share:
        if self.stored is None or cut.tensor.name not in self.stored.linears:
            dtype = _WITHOUT_LOSS.get(self.floats.stored_dtype(cut.tensor), torch.float32)
            entry = Entry(cut.tensor.name, dtype, cut.shape)
            return _Share((entry,), lambda: {entry.name: cut.read(self.floats).to(dtype)})
        linear, scheme = self.stored.linears[cut.tensor.name]
        packing, local = CompressedTensors(self.stored.integers.scale_dtype(linear)), local_linear(cut, linear)
        if local.in_features % (scheme.group_size or 1):
            what = f"{linear.name} has a last group that is not full, which shards do not hold"
            raise UnsupportedError(what, hint="launch it without --materialize")
        reading = AsStored(self.stored)
        entries = tuple(packing.entries(local, scheme))
        return _Share(entries, lambda: packing.tensors(local, reading.quantized(cut, linear, scheme)))


@contextmanager
def _opened(source: ModelSource, schemes: Schemes | None) -> Iterator[_Weights]:
    if schemes is None:
        with open_checkpoint(source) as checkpoint:
            yield _Weights(checkpoint)
        return
    with open_stored(source, schemes) as stored:
        yield _Weights(stored.floats, stored)


def local_linear(cut: Cut, linear: Linear) -> Linear:
    """A linear as large as a rank's share of it."""
    rows, columns = reversed(cut.shape) if linear.transposed else cut.shape
    return replace(linear, out_features=rows, in_features=columns)


def _write(shares: Sequence[_Share], rank: int, folder: Path, plan_hash: str) -> dict[str, Any]:
    path = folder / _name(rank)
    path.parent.mkdir()
    entries = [entry for share in shares for entry in share.entries]
    said = {_PLAN: plan_hash, _RANK: str(rank)}
    with closing(SafetensorsFiles(path.parent, entries, shard_bytes=math.inf, said=said)) as files:
        for share in shares:
            for name, values in share.read().items():
                files.write(name, values)
        files.save()
    return {"file": _name(rank), "bytes": path.stat().st_size}


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
