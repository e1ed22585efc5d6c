"""A model as the stages of a pipeline, each a graph of its own, run one behind the other in onnxruntime.

    FOLDER/  stages.json  stage-0.onnx  stage-0.onnx.data  stage-1.onnx  stage-1.onnx.data …

The first reads token ids and the others hidden states; all read the attention mask, and the cache of their own blocks,
which they give back longer. `stages.json` says which graph comes when, on which device, and what goes in and comes out.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from llmopt.engine.base import Logits, TokenIds
from llmopt.engine.ort import CACHE_DTYPES, LOGITS_AT, open_session, selectable
from llmopt.errors import ArtifactError, UsageError

STAGES = "stages.json"
FORMAT = "onnx-stages"  # of an artifact, as its manifest calls it
SCHEMA = "llmopt.stages/1"
IDS, HIDDEN, NEXT_HIDDEN, LOGITS = "input_ids", "hidden_states", "next_hidden_states", "logits"
MASK = "attention_mask"
_PAST, _PRESENT = "past_key_values.", "present."
_AGAIN = "write it again with llmopt partition --export onnx"

Values = dict[str, NDArray[Any]]


def stage_file(number: int) -> str:
    """What the graph of a stage is called."""
    return f"stage-{number}.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFile:
    """One line of `stages.json`: a graph, its data, and its place. Of tokens or hidden states it `reads` one name."""

    file: str
    data: str
    device: str
    layers: tuple[int, int]
    reads: str
    gives: str


def read_stages(folder: Path) -> tuple[StageFile, ...]:
    """The stages of a folder, in their order.

    Raises:
        ArtifactError: it has none, or `stages.json` says something else than what llmopt writes.
    """
    path = folder / STAGES
    try:
        content = json.loads(path.read_bytes())
        found = TypeAdapter(tuple[StageFile, ...]).validate_python(content["stages"])
        good = content["schema"] == SCHEMA and [one.file for one in found] == [stage_file(n) for n in range(len(found))]
    except OSError as error:
        raise ArtifactError(f"the list of stages cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ArtifactError("this is no list of stages", where=str(path), hint=_AGAIN) from error
    if not good or not found:
        raise ArtifactError("this is no list of stages that this llmopt knows", where=str(path), hint=_AGAIN)
    return found


class StagesEngine:
    """The stages of a folder, all in this process, with `threads` threads; satisfies `llmopt.engine.base.Engine`.

    Raises:
        ArtifactError: a stage is missing, or does not open.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self.stages = [_Stage(folder, one, threads) for one in read_stages(folder)]
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self.vocab_size: int = self.stages[-1].outputs[LOGITS][-1]

    def logits(self, ids_BT: TokenIds) -> Logits:
        """Logits at every position, [batch, tokens, vocab_size]."""
        batch, tokens = ids_BT.shape
        caches = [stage.empty(batch) for stage in self.stages]
        return self.run(ids_BT, caches, np.arange(tokens))

    def run(self, ids_BT: TokenIds, caches: list[Values], at: NDArray[np.int64]) -> Logits:
        """One step of all stages: logits behind the new tokens `at` these places; `caches` are longer then."""
        values: NDArray[Any] = ids_BT
        for number, stage in enumerate(self.stages):
            values, caches[number] = stage.run(values, caches[number], at)
        return cast("Logits", values)

    def stream(self, capacity: int) -> "StagesStream":
        """An empty sequence with room for `capacity` tokens."""
        return StagesStream(self, capacity)


class StagesStream:
    """One sequence; satisfies `llmopt.engine.base.Stream`."""

    def __init__(self, engine: StagesEngine, capacity: int) -> None:
        self._engine, self._capacity, self._length = engine, capacity, 0
        self._caches = [stage.empty(1) for stage in engine.stages]

    def feed(self, ids_T: TokenIds) -> Logits:
        """Append tokens, [T], and give the logits behind the last one, [vocab_size].

        Raises:
            UsageError: the tokens do not fit into the capacity.
        """
        self._length += len(ids_T)
        if self._length > self._capacity:
            raise UsageError(f"{self._length} tokens do not fit into a sequence of {self._capacity}")
        found = self._engine.run(np.ascontiguousarray(ids_T[None]), self._caches, np.array([-1]))
        return cast("Logits", found[0, -1])


class _Stage:
    """One open graph."""

    def __init__(self, folder: Path, entry: StageFile, threads: int) -> None:
        graph = folder / entry.file
        for name in (entry.file, entry.data):
            if not (folder / name).is_file():
                raise ArtifactError(f"{name} is missing", where=str(folder), hint=_AGAIN)
        self.entry = entry
        self.session = open_session(selectable(graph), folder, threads)
        self.outputs = {node.name: node.shape for node in self.session.get_outputs()}
        self.pasts = {node.name: node for node in self.session.get_inputs() if node.name.startswith(_PAST)}
        self.selects = any(node.name == LOGITS_AT for node in self.session.get_overridable_initializers())
        names = {node.name for node in self.session.get_inputs()}
        if entry.reads not in names or entry.gives not in self.outputs:
            raise ArtifactError(f"{entry.file} does not read {entry.reads} or give {entry.gives}", where=str(folder))

    def empty(self, batch: int) -> Values:
        """The cache of a sequence without tokens."""
        return {
            name: np.zeros((batch, node.shape[1], 0, node.shape[3]), CACHE_DTYPES[node.type])
            for name, node in self.pasts.items()
        }

    def run(self, values: NDArray[Any], cache: Mapping[str, NDArray[Any]], at: Any) -> tuple[NDArray[Any], Values]:
        """What it gives, and the cache behind it."""
        seen = next(iter(cache.values())).shape[2]
        mask = np.ones((values.shape[0], seen + values.shape[1]), np.int64)
        feed: Values = {**cache, self.entry.reads: values, MASK: mask}
        if self.selects:
            feed[LOGITS_AT] = at
        presents = [name.replace(_PAST, _PRESENT) for name in self.pasts]
        found, *longer = self.session.run([self.entry.gives, *presents], feed)
        return found, dict(zip(self.pasts, longer, strict=True))
