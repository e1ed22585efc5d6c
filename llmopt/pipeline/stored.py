"""Models whose weights are stored as integers, and which schemes those have. See `stored_weights` for what they hold.

What `llmopt quantize` writes in the formats onnx and hf is one, and so is any checkpoint of compressed-tensors in
schemes that llmopt has names for. A model of floats is none.
"""

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmopt.artifact import MANIFEST, read_manifest
from llmopt.errors import UnsupportedError
from llmopt.export.checkpoint.config_schemes import config_schemes
from llmopt.model.source import CONFIG, ModelSource, open_source
from llmopt.progress import Progress, Silent
from llmopt.quantize.scheme import Scheme

if TYPE_CHECKING:
    from llmopt.export.onnx.stored import GraphWeights

Schemes = Mapping[str, Scheme]  # by the names of linears, and of the token table
Format = Literal["hf", "onnx"]
_SILENT = Silent()


def open_model(
    model: str, *, revision: str | None = None, weights: bool = True, progress: Progress = _SILENT
) -> ModelSource:
    """A model of floats or of integers; see `open_source`. Of a graph, the spec is that of what it computes.

    Raises:
        UnsupportedError: it is an artifact of which ranks cannot read their parts.
        LlmoptError: see `open_source`.
    """
    path = Path(os.path.expanduser(model))
    made = read_manifest(path) if (path / MANIFEST).is_file() else None
    if made is None or made.format == "hf":
        return open_source(model, revision=revision, weights=weights, quantized=True, progress=progress)
    if made.format != "onnx" or made.cast is not None:
        what = f"ranks cannot read their parts of an artifact of format {made.format}, {made.method or 'as it is'}"
        raise UnsupportedError(what, where=model, hint="llmopt quantize MODEL -o OUT writes another")
    source = open_source(model, revision=revision, weights=False)
    with closing(_graph(source)) as graph:
        return replace(source, spec=graph.spec)


def stored_format(source: ModelSource) -> Format | None:
    """The format of a model of integers; None for one of floats."""
    if source.quantization is not None:
        return "hf"
    folder = source.folder
    is_graph = folder is not None and (folder / MANIFEST).is_file() and read_manifest(folder).format == "onnx"
    return "onnx" if is_graph else None


def stored_schemes(source: ModelSource) -> Schemes | None:
    """The schemes that a model's weights are stored in; None for a model of floats.

    Raises:
        LlmoptError: what its config or its graph says of them is not understood.
    """
    match stored_format(source):
        case "hf":
            assert source.quantization is not None
            where = source.name if source.folder is None else str(source.folder / CONFIG)
            return config_schemes(source.spec, source.quantization, where=where)
        case "onnx":
            with closing(_graph(source)) as graph:
                return graph.schemes()
        case None:
            return None


def _graph(source: ModelSource) -> "GraphWeights":
    from llmopt.export.onnx.stored import GraphWeights  # noqa: PLC0415 (onnx, which others need not wait for)

    assert source.folder is not None
    return GraphWeights(source.folder, source.spec)
