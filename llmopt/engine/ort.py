"""An exported model in onnxruntime, used as its users do: one KV buffer per block, shared between past and present."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime

from llmopt.engine.base import Logits, TokenIds
from llmopt.errors import ArtifactError, UsageError

GRAPH = "model.onnx"
GENAI_CONFIG = "genai_config.json"

# A constant of our graphs, int64 [logits]: which of the new tokens get logits. It holds -1, the last that is no
# padding: all that is needed to generate. Protocol buffers merge messages that are written one behind the other, so a
# graph file with these bytes behind it is the same graph with the constant as an input, which may be fed.
LOGITS_AT = "logits_at"
AS_INPUT = b":\x1fZ\x1d\n\tlogits_at\x12\x10\n\x0e\x08\x07\x12\n\n\x08\x12\x06logits"


def open_session(graph: Path | bytes, folder: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open a graph, a file or what would be in one, whose data lies in `folder`, on the CPU.

    Raises:
        ArtifactError: onnxruntime cannot open it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    content = graph if isinstance(graph, bytes) else str(graph)
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    # onnxruntime's own exceptions derive from Exception alone; all of them mean that the graph does not open.
    except Exception as error:
        where = str(folder if isinstance(graph, bytes) else graph)
        raise ArtifactError(f"onnxruntime cannot open the graph: {error}", where=where) from error


def selectable(graph: Path) -> Path | bytes:
    """One of our own graphs with `LOGITS_AT` as an input; others, which may be large, as they are."""
    content = graph.read_bytes()
    return content + AS_INPUT if LOGITS_AT.encode() in content else graph


def chunk_size(folder: Path) -> int | None:
    """Into pieces of how many tokens onnxruntime-genai, and with it this engine, cuts a prompt; None: it does not.

    Raises:
        ArtifactError: genai_config.json is none.
    """
    path = folder / GENAI_CONFIG
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())["search"].get("chunk_size")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError("this is no config of onnxruntime-genai", where=str(path)) from error
    return found if isinstance(found, int) and found > 0 else None


class OrtEngine:
    """An artifact folder (or its .onnx file) on the CPU with `threads` threads; satisfies `llmopt.engine.base.Engine`.

    Raises:
        ArtifactError: there is no graph, it does not open, or its inputs are not those of a decoder.
    """

    def __init__(self, path: Path, threads: int) -> None:
        graph = path / GRAPH if path.is_dir() else path
        if not graph.is_file():
            raise ArtifactError("there is no model.onnx", where=str(path), hint="write one with `llmopt quantize`")
        self.session = open_session(selectable(graph), graph.parent, threads)
        self.name = f"onnxruntime {onnxruntime.__version__}"
        inputs = {node.name: node for node in self.session.get_inputs()}
        self.past_names = [name for name in inputs if name.startswith("past_key_values.")]
        if "input_ids" not in inputs or not self.past_names:
            raise ArtifactError("the graph is not a decoder with a KV cache", where=str(graph))
        _, self.kv_heads, _, self.head_dim = inputs[self.past_names[0]].shape
        self.present_names = [name.replace("past_key_values.", "present.") for name in self.past_names]
        self.selects_logits = any(node.name == LOGITS_AT for node in self.session.get_overridable_initializers())
        logits = next(node for node in self.session.get_outputs() if node.name == "logits")
        self.vocab_size: int = logits.shape[-1]
        self.chunk_size = chunk_size(graph.parent)

    def logits(self, ids_BT: TokenIds) -> Logits:
        """Logits at every position, shape [batch, tokens, vocab_size]."""
        batch, tokens = ids_BT.shape
        empty = np.zeros((batch, self.kv_heads, 0, self.head_dim), np.float32)
        feed: dict[str, Any] = dict.fromkeys(self.past_names, empty)
        feed["input_ids"] = ids_BT
        feed["attention_mask"] = np.ones((batch, tokens), np.int64)
        if self.selects_logits:
            feed[LOGITS_AT] = np.arange(tokens)
        return cast("Logits", self.session.run(["logits"], feed)[0])

    def stream(self, capacity: int) -> "OrtStream":
        """An empty sequence with room for `capacity` tokens."""
        return OrtStream(self, capacity)


class OrtStream:
    """One sequence; its KV buffers are allocated once and written in place by the attention kernel."""

    def __init__(self, engine: OrtEngine, capacity: int) -> None:
        self.engine = engine
        self.capacity = capacity
        self.length = 0
        self.mask = np.ones((1, capacity), np.int64)
        shape: Sequence[int] = (1, engine.kv_heads, capacity, engine.head_dim)
        self.binding = engine.session.io_binding()
        # Past and present are the same memory: the kernel then appends instead of copying the whole cache each step.
        for past, present in zip(engine.past_names, engine.present_names, strict=True):
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            self.binding.bind_ortvalue_input(past, buffer)
            self.binding.bind_ortvalue_output(present, buffer)

    def feed(self, ids_T: TokenIds) -> Logits:
        """Append tokens, shape [T], and give the logits behind the last one, shape [vocab_size].

        Raises:
            UsageError: the tokens do not fit into the capacity.
        """
        if (total := self.length + len(ids_T)) > self.capacity:
            raise UsageError(f"{total} tokens do not fit into a sequence of {self.capacity}")
        size = self.engine.chunk_size or len(ids_T) or 1
        for start in range(0, len(ids_T), size):
            self._append(ids_T[start : start + size])
        return cast("Logits", self.binding.get_outputs()[-1].numpy()[0, -1])

    def _append(self, ids_T: TokenIds) -> None:
        total = self.length + len(ids_T)
        self.binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids_T[None]))
        self.binding.bind_cpu_input("attention_mask", np.ascontiguousarray(self.mask[:, :total]))
        self.binding.bind_output("logits")  # anew: the last call left a buffer of its own shape bound
        self.engine.session.run_with_iobinding(self.binding)
        self.length = total
