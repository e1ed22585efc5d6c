"""Every family as a graph: in onnxruntime it computes what its spec means in torch, whatever the schemes."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto

from llmopt.engine.ort import OrtEngine
from llmopt.errors import UnsupportedError
from llmopt.export.onnx.decoder import DecoderGraph
from llmopt.export.onnx.levels import in_float32
from llmopt.model.spec import ModelSpec
from llmopt.pipeline.verify import Reference, References
from tests.decoders import SchemeOf, write_decoder
from tests.families import CASES, COMMON, random_weights, spec_of
from tests.onnx_nodes import Array, long_way, relative_error

TOKENS = 24  # more than every sliding window
IDS_BT = np.random.default_rng(0).integers(0, 97, (2, TOKENS))
FLOAT32 = 5e-6  # relative error of logits after three blocks in another order of sums
FLOAT32_INT8 = 2e-5  # an int8 product is put together from two parts, which cancel
ONE_BY_ONE = (
    0.05  # activations rounded to int8 that lie between two codes fall to either side, and move all behind them
)


def everywhere(scheme: str | None) -> SchemeOf:
    return lambda name: scheme


def mixed(name: str) -> str | None:
    """Linears that share their input get different schemes, and some none."""
    match name.rpartition(".")[2]:
        case "q_proj" | "up_proj" | "c_fc" | "fc1" | "qkv_proj":
            return "w4a16"
        case "k_proj" | "down_proj" | "embed_tokens" | "wte":
            return "w8a16-g32-asym"
        case "o_proj" | "c_proj" | "out_proj":
            return "w8a8"
        case "gate_proj" | "c_attn" | "lm_head":
            return "w4a16-g64-sym"
    return None


SCHEMES: Mapping[str, SchemeOf] = {
    "float": everywhere(None),
    "w8a16": everywhere("w8a16"),
    "w2a16": everywhere("w2a16"),
    "w4a16": everywhere("w4a16"),
    "w4a16-sym": everywhere("w4a16-sym"),
    "w4a16-channel": everywhere("w4a16-channel"),
    "w8a8": everywhere("w8a8"),
    "mixed": mixed,
}


def float32_engine(folder: Path) -> OrtEngine:
    twin = in_float32(onnx.load(folder / "model.onnx", load_external_data=False))
    (folder / "float32.onnx").write_bytes(twin.SerializeToString())
    return OrtEngine(folder / "float32.onnx", threads=1)


@dataclass(frozen=True)
class Written:
    """A decoder's folder, with its references on `IDS_BT`."""

    folder: Path
    schemes: str
    spec: ModelSpec
    references: References

    def engine(self) -> OrtEngine:
        """The graph with float32 activations, so that both sides round alike."""
        return float32_engine(self.folder)

    def nodes(self, op: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph().node if node.op_type == op]

    def graph(self) -> onnx.GraphProto:
        return long_way(self.folder).graph


def write(folder: Path, case: str, schemes: str) -> Written:
    torch.set_num_threads(1)
    spec = spec_of(CASES[case])
    saved = random_weights(spec)
    references = write_decoder(folder, spec, saved, SCHEMES[schemes], list(IDS_BT))
    return Written(folder, schemes, spec, references)


def logits_of(reference: Reference) -> Array:
    return np.stack([reference.logits(index) for index in range(len(IDS_BT))])


@pytest.fixture(scope="module", params=[(case, schemes) for case in CASES for schemes in SCHEMES], ids=" / ".join)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("decoder"), *request.param)


def test_a_graph_computes_what_the_spec_means(written: Written) -> None:
    """Both rows in one batch, and each alone; then token by token over one shared cache."""
    engine, expected_BTV = written.engine(), logits_of(written.references.exact)
    tolerance = FLOAT32_INT8 if written.nodes("MatMulIntegerToFloat") else FLOAT32
    assert relative_error(engine.logits(IDS_BT), expected_BTV) < tolerance
    for ids_T, expected_TV in zip(IDS_BT, expected_BTV, strict=True):
        assert relative_error(engine.logits(ids_T[None])[0], expected_TV) < tolerance

    stream = engine.stream(capacity=TOKENS + 3)
    positions = [4, *range(5, 8), 16, *range(17, TOKENS)]
    fed = [stream.feed(piece) for piece in np.split(IDS_BT[0], np.array(positions[:-1]) + 1)]
    assert relative_error(np.stack(fed), expected_BTV[0, positions]) < tolerance


def test_tokens_fed_one_by_one_have_the_logits_that_they_have_together(written: Written) -> None:
    engine = OrtEngine(written.folder, threads=1)
    stream = engine.stream(capacity=TOKENS)
    alone = np.stack([stream.feed(IDS_BT[0, place : place + 1]) for place in range(TOKENS)])
    assert relative_error(alone, engine.logits(IDS_BT[:1])[0]) < ONE_BY_ONE


def test_attention_is_one_node_a_block(written: Written) -> None:
    nodes = written.nodes("GroupQueryAttention")
    assert len(nodes) == len(written.spec.blocks)
    assert not written.nodes("Softmax")
    for node, block in zip(nodes, written.spec.blocks, strict=True):
        attention, has = block.attention, attributes(node)
        assert (has["num_heads"], has["kv_num_heads"]) == (attention.heads, attention.kv_heads)
        assert has["scale"] == pytest.approx(attention.scale)
        assert has.get("local_window_size") == attention.window


def test_every_product_is_of_the_kind_that_its_scheme_asks_for(written: Written) -> None:
    """A quantized linear that became a float product would compute the same, slowly and from more bytes."""
    kinds = {"MatMul": "float", "FusedMatMul": "float", "MatMulIntegerToFloat": "int8"}
    found = Counter(kinds[node.op_type] for op in kinds for node in written.nodes(op))
    found += Counter(f"w{attributes(node)['bits']}" for node in written.nodes("MatMulNBits"))
    assert found == Counter(expected_kinds(written.spec, SCHEMES[written.schemes]))


def expected_kinds(spec: ModelSpec, scheme_of: SchemeOf) -> list[str]:
    """One a product: q, k and v are one product where they agree, and gate and up where only weights are rounded."""
    schemes = []
    for block in spec.blocks:
        queries, gates = ([scheme_of(linear.name) for linear in part.inputs] for part in (block.attention, block.mlp))
        schemes += queries[:1] if len(set(queries)) == 1 else queries
        schemes += gates[:1] if len(set(gates)) == 1 and gates[0] not in {None, "w8a8"} else gates
        schemes += [scheme_of(linear.name) for linear in (block.attention.output, block.mlp.down)]
    schemes.append(scheme_of(spec.embedding.name if spec.tied else spec.head.name))
    return ["float" if scheme is None else "int8" if scheme == "w8a8" else scheme[:2] for scheme in schemes]


def test_weight_only_products_are_written_for_the_fast_kernel(written: Written) -> None:
    """Level 4, no g_idx, and zero points as packed bytes, or none where the scheme is symmetric."""
    kinds = {tensor.name: tensor.data_type for tensor in written.graph().initializer}
    for node in written.nodes("MatMulNBits"):
        _, codes, scales, zeros, g_idx, _ = [*node.input, "", "", ""][:6]
        assert attributes(node)["accuracy_level"] == 4
        assert g_idx == ""
        assert kinds[codes] == TensorProto.UINT8
        assert kinds[scales] == TensorProto.FLOAT
        assert zeros == "" or kinds[zeros] == TensorProto.UINT8
        if written.schemes in {"w8a16", "w4a16-sym"}:
            assert zeros == ""
        if written.schemes in {"w4a16", "w4a16-channel"}:
            assert zeros != ""


def test_a_tied_head_reads_the_bytes_of_the_embedding(written: Written) -> None:
    stored = {tensor.name: place_of(tensor) for tensor in written.graph().initializer if tensor.external_data}
    readers: dict[str, set[tuple[int, int]]] = {"embedding": set(), "head": set()}
    head = written.spec.head.name
    for node in written.graph().node:
        by = "embedding" if "input_ids" in node.input else "head" if node.name in {head, f"{head}/integers"} else None
        if by is not None:
            readers[by] |= {stored[name] for name in node.input if name in stored}
    assert readers["embedding"]
    assert readers["head"]
    if written.spec.tied:
        assert readers["embedding"] <= readers["head"] or readers["head"] <= readers["embedding"]
    else:
        assert not readers["embedding"] & readers["head"]


def test_no_byte_is_written_twice_and_each_tensor_begins_on_a_cache_line(written: Written) -> None:
    places = {place_of(tensor) for tensor in written.graph().initializer if tensor.external_data}
    end = 0
    for offset, length in sorted(places):
        assert offset % 64 == 0
        assert end <= offset < end + 64
        end = offset + length
    assert (written.folder / "model.onnx.data").stat().st_size == end


def place_of(tensor: TensorProto) -> tuple[int, int]:
    place = {item.key: item.value for item in tensor.external_data}
    assert place["location"] == "model.onnx.data"
    return int(place["offset"]), int(place["length"])


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


@pytest.mark.parametrize("case", CASES)
def test_what_ships_with_int8_activations_errs_as_rounding_them_in_torch_does(case: str, tmp_path: Path) -> None:
    written = write(tmp_path, case, "w8a8")
    assert written.references.rounded is not None
    exact, rounded = logits_of(written.references.exact), logits_of(written.references.rounded)
    shipped = OrtEngine(tmp_path, threads=1).logits(IDS_BT)
    assert 0.5 < relative_error(shipped, exact) / relative_error(rounded, exact) < 2


@pytest.mark.parametrize("schemes", SCHEMES)
def test_two_exports_write_the_same_bytes(schemes: str, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "gemma3", schemes)
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("case", ["gpt2", "opt"])
def test_a_graph_passes_the_checker_where_every_operator_has_a_known_domain(case: str, tmp_path: Path) -> None:
    """Not with RMS norms: onnxruntime's operator for them is in the standard domain, and not in the standard."""
    for schemes in ("w8a16", "w8a8"):
        folder = tmp_path / schemes
        folder.mkdir()
        write(folder, case, schemes)
        onnx.checker.check_model(folder / "model.onnx")


def test_blocks_that_rotate_alike_share_their_tables(tmp_path: Path) -> None:
    names = [tensor.name for tensor in write(tmp_path, "gemma3", "float").graph().initializer]
    assert [name for name in names if name.startswith("rotary")] == [
        "rotary.0.cos", "rotary.0.sin", "rotary.1.cos", "rotary.1.sin"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "inside"),
    [("llama", True), ("mistral, whole context", True), ("llama, tied, wide heads", False), ("phi3", False)],
)
def test_the_attention_kernel_rotates_heads_that_it_can(case: str, inside: bool, tmp_path: Path) -> None:
    """Multiples of 16 channels, of which multiples of 16 are rotated."""
    written = write(tmp_path, case, "float")
    assert {attributes(node)["do_rotary"] for node in written.nodes("GroupQueryAttention")} == {int(inside)}
    assert len(written.nodes("RotaryEmbedding")) == (0 if inside else 2 * len(written.spec.blocks))
    assert len(written.nodes("Split")) == (0 if inside else len(written.spec.blocks)) + (
        len(written.spec.blocks) if case == "phi3" else 0  # gate and up are one product
    )


def test_heads_without_a_kernel_are_refused_before_a_file_is_written(tmp_path: Path) -> None:
    spec = spec_of(transformers.LlamaConfig(**COMMON, head_dim=12))
    with pytest.raises(UnsupportedError, match="heads of 12 channels"):
        DecoderGraph(tmp_path, spec)
    assert not list(tmp_path.iterdir())


def test_a_bias_of_a_tied_head_is_added(tmp_path: Path) -> None:
    spec = spec_of(CASES["llama, tied, wide heads"])
    spec = dataclasses.replace(spec, head=dataclasses.replace(spec.head, bias=True))
    for scheme in (None, "w8a16", "w8a8"):
        folder = tmp_path / str(scheme)
        folder.mkdir()
        references = write_decoder(folder, spec, random_weights(spec), everywhere(scheme), list(IDS_BT))
        engine = float32_engine(folder)
        assert relative_error(engine.logits(IDS_BT), logits_of(references.exact)) < FLOAT32_INT8
