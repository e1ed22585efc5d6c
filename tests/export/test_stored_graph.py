"""A graph read back: floats and integers under the names of the model, whole and in part."""

from contextlib import closing

import pytest
import torch

from llmopt.errors import ArtifactError
from llmopt.export.onnx.stored import GraphWeights
from llmopt.pipeline.parts import PartReader
from llmopt.pipeline.stored_weights import by_weight
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.weights import QuantizedWeight
from tests.decoders import assignments, write_decoder
from tests.export.test_decoder import IDS_BT, SCHEMES
from tests.families import CASES, random_weights, spec_of


@pytest.fixture(params=[(case, schemes) for case in CASES for schemes in ("float", "w4a16", "w8a8", "mixed")])
def written(request, tmp_path):
    """A graph, open; its spec, and what was written into it, by the names of weights."""
    case, schemes = request.param
    spec = spec_of(CASES[case])
    saved, given = random_weights(spec), assignments(spec, SCHEMES[schemes])
    write_decoder(tmp_path, spec, saved, SCHEMES[schemes], [IDS_BT[0]])
    parts = PartReader(spec, saved, given, Rtn())
    embedding = parts.embedding()
    expected = dict(embedding.weights)
    for part in parts.blocks():
        expected |= part.weights
    expected |= parts.head(embedding).weights
    with closing(GraphWeights(tmp_path, spec)) as graph:
        yield graph, spec, expected, saved


def test_what_was_written_is_read_back(written):
    graph, spec, expected, saved = written
    linears = by_weight(spec, graph.schemes())
    assert {name for name, weight in expected.items() if isinstance(weight, QuantizedWeight)} == set(linears)
    for tensor in spec.tensors():
        if tensor.name not in linears:
            torch.testing.assert_close(graph.read(tensor), saved.read(tensor), atol=1e-6, rtol=0)
            continue
        linear, scheme = linears[tensor.name]
        graph.require(linear, scheme)
        found = graph.read_integers(linear, scheme)
        assert torch.equal(found.codes_OI, expected[tensor.name].codes_OI)
        assert torch.equal(found.dequantize(), expected[tensor.name].dequantize())


def test_a_part_is_that_of_the_whole(written):
    graph, spec, _, _ = written
    for linear, scheme in by_weight(spec, graph.schemes()).values():
        whole_OI = graph.read_integers(linear, scheme).dequantize()
        some = graph.read_integers(linear, scheme, rows=((3, 10), (15, 24))).dequantize()
        assert torch.equal(some, torch.cat([whole_OI[3:10], whole_OI[15:24]]))
        some = graph.read_integers(linear, scheme, columns=((32, linear.in_features),)).dequantize()
        if scheme.group_size in {None, 32}:
            assert torch.equal(some, whole_OI[:, 32:])


def test_a_folder_without_a_graph_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"there is no model\.onnx"):
        GraphWeights(tmp_path, spec_of(CASES["llama"]))
