"""Decoders as graphs, and the same weights in torch beside them."""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from llmopt.engine.base import TokenIds
from llmopt.export.onnx.decoder import DecoderGraph
from llmopt.model.spec import ModelSpec
from llmopt.pipeline.parts import PartReader
from llmopt.pipeline.verify import References
from llmopt.quantize.assign import Assignment
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from tests.families import Saved

SchemeOf = Callable[[str], str | None]


def assignments(spec: ModelSpec, scheme_of: SchemeOf) -> dict[str, Assignment]:
    """Each embedding and linear with the scheme of its name; a tied head has the embedding's."""
    found = {}
    for name in (spec.embedding.name, *(linear.name for linear in spec.linears())):
        scheme = scheme_of(spec.embedding.name if spec.tied and name == spec.head.name else name)
        found[name] = Assignment(name=name, scheme=None if scheme is None else parse_scheme(scheme))
    return found


def write_decoder(
    folder: Path,
    spec: ModelSpec,
    saved: Saved,
    scheme_of: SchemeOf,
    windows: Sequence[TokenIds],
) -> References:
    """Write model.onnx into the folder; gives the references, which ran on the windows."""
    parts = PartReader(spec, saved, assignments(spec, scheme_of), Rtn())
    references = References(spec, list(windows), rounds_activations=True)
    with closing(DecoderGraph(folder, spec)) as graph:
        embedding = parts.embedding()
        graph.embedding(embedding.weights)
        references.embedding(embedding.weights)
        for block, part in zip(spec.blocks, parts.blocks(), strict=True):
            graph.block(block, part.weights)
            references.block(block, part.weights)
        head = parts.head(embedding)
        graph.head(head.weights)
        references.head(head.weights)
        graph.save("0")
    return references
