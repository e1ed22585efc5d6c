"""A model in parts: every tensor once, quantized as assigned, and said what became of it."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from llmopt.model.spec import ModelSpec, TensorSpec
from llmopt.pipeline import parts as parts_module
from llmopt.pipeline.parts import Part, PartReader
from llmopt.quantize.grid import ScaleRule
from llmopt.quantize.method import InputStatistics
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import Scheme, parse_scheme
from llmopt.quantize.search import Search
from llmopt.quantize.weights import QuantizedWeight
from tests.decoders import SchemeOf, assignments
from tests.families import CASES, Saved, random_weights, spec_of

W4 = parse_scheme("w4a16")


@dataclass(frozen=True)
class Model:
    spec: ModelSpec
    saved: Saved

    def reader(self, scheme_of: SchemeOf = lambda name: "w4a16") -> PartReader:
        return PartReader(self.spec, self.saved, assignments(self.spec, scheme_of), Rtn())

    def parts(self, scheme_of: SchemeOf = lambda name: "w4a16") -> list[Part]:
        reader = self.reader(scheme_of)
        embedding = reader.embedding()
        return [embedding, *reader.blocks(), reader.head(embedding)]


def model(case: str) -> Model:
    spec = spec_of(CASES[case])
    return Model(spec, random_weights(spec))


def assert_same(actual: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert actual.scheme == expected.scheme
    assert torch.equal(actual.codes_OI, expected.codes_OI)
    assert torch.equal(actual.dequantize(), expected.dequantize())


@pytest.mark.parametrize("case", CASES)
def test_parts_hold_every_tensor_of_the_model(case: str) -> None:
    found = model(case)
    parts = found.parts()
    names = [name for part in parts for name in part.weights]
    if found.spec.tied:
        names.remove(found.spec.head.weight.name)  # it is in the first part and in the last
    assert sorted(names) == sorted(tensor.name for tensor in found.spec.tensors())
    assert len(parts) == len(found.spec.blocks) + 2


@pytest.mark.parametrize("case", CASES)
def test_every_linear_and_the_embedding_are_reported_once_and_in_order(case: str) -> None:
    found = model(case)
    layers = [layer for part in found.parts() for layer in part.layers]
    names = [found.spec.embedding.name, *(linear.name for linear in found.spec.linears())]
    assert [layer.name for layer in layers] == names
    assert {(layer.scheme, layer.method) for layer in layers} == {("w4a16-g32-asym", "rtn")}


def test_a_table_that_is_rounded_instead_has_scales_as_the_method_may_have_them() -> None:
    found = model("llama")
    method = Search(scales=ScaleRule(dtype=torch.bfloat16))
    table = PartReader(found.spec, found.saved, assignments(found.spec, lambda name: "w4a16"), method).embedding()
    weight = table.weights[f"{found.spec.embedding.name}.weight"]
    assert isinstance(weight, QuantizedWeight)
    assert torch.equal(weight.scales_OG, weight.scales_OG.bfloat16().float())


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_linears_are_quantized_out_by_in_and_other_tensors_stay_as_stored(case: str) -> None:
    """GPT-2 stores its linears the other way round."""
    found = model(case)
    weights = {name: weight for part in found.parts() for name, weight in part.weights.items()}
    linears = {linear.weight.name: linear for linear in found.spec.linears()}
    for name, weight in weights.items():
        stored = found.saved.tensors[name]
        if name in linears:
            expected = stored.T.contiguous() if linears[name].transposed else stored
            assert_same(weight, Rtn().quantize(expected, W4))
        elif name != f"{found.spec.embedding.name}.weight":
            assert torch.equal(weight, stored)


def test_a_linear_that_stays_float_is_turned_all_the_same() -> None:
    found = model("gpt2")
    (first, *_) = found.reader(lambda name: None).blocks()
    stored = found.saved.tensors["transformer.h.0.mlp.c_fc.weight"]
    weight = first.weights["transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(weight, stored.T)
    assert weight.is_contiguous()


def test_the_reported_error_is_that_of_the_layer() -> None:
    found = model("llama")
    for part in found.parts():
        for layer in part.layers:
            stored = found.saved.tensors[f"{layer.name}.weight"]
            weight = part.weights[f"{layer.name}.weight"]
            assert layer.relative_error == pytest.approx(weight.relative_error(stored), rel=1e-6)
            assert layer.relative_error > 0.01


def test_what_has_no_scheme_stays_float_and_says_so() -> None:
    found = model("llama")
    parts = found.parts(lambda name: None if "k_proj" in name else "w8a16")
    layers = {layer.name: layer for part in parts for layer in part.layers}
    layer = layers["model.layers.1.self_attn.k_proj"]
    assert (layer.scheme, layer.method, layer.relative_error) == (None, None, None)
    assert layer.reason == "not quantized"
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(parts[2].weights[name], found.saved.tensors[name])
    assert layers["model.layers.1.self_attn.q_proj"].scheme == "w8a16-g64-sym"


def test_without_a_method_nothing_is_quantized() -> None:
    found = model("llama")
    reader = PartReader(found.spec, found.saved, assignments(found.spec, lambda name: "w4a16"), None)
    embedding = reader.embedding()
    for part in [embedding, *reader.blocks(), reader.head(embedding)]:
        assert all(isinstance(weight, Tensor) for weight in part.weights.values())
        assert {(layer.scheme, layer.reason) for layer in part.layers} == {(None, "not quantized")}


def test_a_tied_head_is_the_embeddings_table() -> None:
    found = model("qwen3")
    embedding, *_, head = found.parts()
    table = f"{found.spec.embedding.name}.weight"
    assert head.weights[table] is embedding.weights[table]
    assert head.layers[0].relative_error == embedding.layers[0].relative_error
    assert head.layers[0].name == "lm_head"


def test_a_table_is_quantized_in_parts_that_are_read_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    found, read = model("llama"), []

    class Noting(Saved):
        def read_rows(self, tensor: TensorSpec, start: int, stop: int) -> Tensor:
            read.append((tensor.name, start, stop))
            return super().read_rows(tensor, start, stop)

    whole = found.reader().embedding()
    monkeypatch.setattr(parts_module, "CHUNK_WEIGHTS", 40 * 64)  # forty rows
    reader = PartReader(found.spec, Noting(found.saved.tensors), assignments(found.spec, lambda name: "w4a16"), Rtn())
    in_parts, name = reader.embedding(), "model.embed_tokens.weight"
    assert read == [(name, 0, 40), (name, 40, 80), (name, 80, 97)]
    assert_same(in_parts.weights[name], whole.weights[name])
    assert in_parts.layers[0].relative_error == pytest.approx(whole.layers[0].relative_error, rel=1e-6)


def test_a_method_that_looks_at_all_rows_gets_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    @dataclass(frozen=True)
    class Whole(Rtn):
        rows_are_independent: bool = False

        def quantize(self, weight_OI: Tensor, scheme: Scheme, inputs: InputStatistics | None = None) -> QuantizedWeight:
            shapes.append(tuple(weight_OI.shape))
            return super().quantize(weight_OI, scheme, inputs)

    monkeypatch.setattr(parts_module, "CHUNK_WEIGHTS", 40 * 64)
    found = model("llama")
    PartReader(found.spec, found.saved, assignments(found.spec, lambda name: "w4a16"), Whole()).embedding()
    assert shapes == [(97, 64)]


def test_blocks_are_read_one_at_a_time() -> None:
    """So that memory does not grow with their number."""
    found, read = model("llama"), []

    class Noting(Saved):
        def read(self, tensor: TensorSpec) -> Tensor:
            read.append(tensor.name)
            return super().read(tensor)

    blocks = PartReader(
        found.spec, Noting(found.saved.tensors), assignments(found.spec, lambda name: None), Rtn()
    ).blocks()
    assert not read
    next(blocks)
    assert {name.split(".")[2] for name in read} == {"0"}


def test_a_table_of_zeros_has_no_error() -> None:
    found = model("llama")
    name = "model.embed_tokens.weight"
    zeros = Saved({**found.saved.tensors, name: torch.zeros(97, 64)})
    reader = PartReader(found.spec, zeros, assignments(found.spec, lambda name: "w4a16"), Rtn())
    assert reader.embedding().layers[0].relative_error == 0.0
