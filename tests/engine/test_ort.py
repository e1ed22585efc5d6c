"""An exported decoder in onnxruntime: whole sequences, and streams over one buffer."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from llmopt.engine.base import TokenIds
from llmopt.engine.ort import AS_INPUT, GENAI_CONFIG, LOGITS_AT, OrtEngine, OrtStream, open_session
from llmopt.errors import ArtifactError, UsageError
from llmopt.export.onnx.graph import Graph
from tests.decoders import write_decoder
from tests.families import CASES, random_weights, spec_of

IDS = np.random.default_rng(0).integers(0, 97, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, spec = tmp_path_factory.mktemp("artifact"), spec_of(CASES["mistral"])
    write_decoder(folder, spec, random_weights(spec), lambda name: "w4a16", [IDS])
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> OrtEngine:
    return OrtEngine(folder, threads=1)


def test_an_engine_says_what_it_is(engine: OrtEngine) -> None:
    assert engine.name == f"onnxruntime {onnxruntime.__version__}"
    assert engine.vocab_size == 97


def test_the_folder_and_its_graph_are_the_same_artifact(folder: Path, engine: OrtEngine) -> None:
    by_file = OrtEngine(folder / "model.onnx", threads=1)
    np.testing.assert_array_equal(by_file.logits(IDS[None]), engine.logits(IDS[None]))


def test_logits_are_given_at_every_position_of_every_row(engine: OrtEngine) -> None:
    ids_BT = np.stack([IDS[:12], IDS[12:]])
    logits = engine.logits(ids_BT)
    assert (logits.shape, logits.dtype) == ((2, 12, 97), np.float32)
    for row, alone in zip(logits, ids_BT, strict=True):
        np.testing.assert_allclose(row, engine.logits(alone[None])[0], atol=1e-4)


@pytest.mark.parametrize("lengths", [[24], [5, 1, 1, 1, 1], [1, 1, 1], [3, 7, 1, 4], [9, 9]])
def test_a_stream_gives_the_logits_behind_what_was_fed(engine: OrtEngine, lengths: list[int]) -> None:
    whole = engine.logits(IDS[None])[0]
    stream, stop = engine.stream(capacity=24), 0
    for length in lengths:
        logits = stream.feed(IDS[stop : stop + length])
        stop += length
        assert (logits.shape, logits.dtype) == ((97,), np.float32)
        assert np.abs(logits - whole[stop - 1]).max() < 0.02 * np.abs(whole).max()  # level 4 rounds by blocks


def test_streams_of_one_engine_do_not_disturb_each_other(engine: OrtEngine) -> None:
    alone = engine.stream(capacity=10)
    expected = [alone.feed(IDS[:4]), alone.feed(IDS[4:5])]
    first, second = engine.stream(capacity=10), engine.stream(capacity=20)
    began = first.feed(IDS[:4])
    second.feed(IDS[10:17])
    went_on = first.feed(IDS[4:5])
    np.testing.assert_array_equal(np.stack([began, went_on]), np.stack(expected))


def test_logits_that_were_given_stay_as_they_are(engine: OrtEngine) -> None:
    stream = engine.stream(capacity=10)
    first = stream.feed(IDS[:4])
    kept = first.copy()
    stream.feed(IDS[4:5])
    np.testing.assert_array_equal(first, kept)


def test_past_and_present_are_the_same_memory(engine: OrtEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel then appends in place; in two buffers the whole cache would be copied for every token."""
    made: list[onnxruntime.OrtValue] = []
    make = onnxruntime.OrtValue.ortvalue_from_numpy

    def noting(array: np.ndarray) -> onnxruntime.OrtValue:
        made.append(make(array))
        return made[-1]

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", noting)
    stream = engine.stream(capacity=10)
    assert len(made) == len(engine.past_names) == 6
    stream.feed(IDS[:4])
    stream.feed(IDS[4:5])
    for buffer in made:
        filled = buffer.numpy().any(axis=(0, 1, 3))
        assert filled.tolist() == [True] * 5 + [False] * 5


def test_a_stream_takes_no_more_than_its_capacity(engine: OrtEngine) -> None:
    stream = engine.stream(capacity=6)
    stream.feed(IDS[:4])
    with pytest.raises(UsageError, match="7 tokens do not fit into a sequence of 6"):
        stream.feed(IDS[4:7])
    stream.feed(IDS[4:6])


def test_a_folder_without_a_graph_is_no_artifact(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.onnx"):
        with pytest.raises(ArtifactError, match=r"no model\.onnx") as caught:
            OrtEngine(path, threads=1)
        assert caught.value.where == str(path)


def test_a_damaged_graph_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match="onnxruntime cannot open") as caught:
        OrtEngine(tmp_path, threads=1)
    assert caught.value.where == str(tmp_path / "model.onnx")


def test_a_graph_whose_data_is_missing_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data"):
        open_session(tmp_path / "model.onnx", tmp_path, threads=1)


def test_a_graph_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    graph.input("x", TensorProto.FLOAT, ["rows"])
    graph.node("Relu", ["x"], "relu", outputs=["y"])
    graph.output("y", TensorProto.FLOAT, ["rows"])
    graph.save("0")
    with pytest.raises(ArtifactError, match="not a decoder"):
        OrtEngine(tmp_path, threads=1)


def plain_session(folder: Path) -> onnxruntime.InferenceSession:
    """The artifact as others open it, who know nothing of `LOGITS_AT`."""
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def plain_feed(engine: OrtEngine, ids_BT: TokenIds, mask_BT: TokenIds) -> dict[str, object]:
    empty = np.zeros((len(ids_BT), engine.kv_heads, 0, engine.head_dim), np.float32)
    return dict.fromkeys(engine.past_names, empty) | {"input_ids": ids_BT, "attention_mask": mask_BT}


def test_other_programs_get_the_logits_of_the_last_token(folder: Path, engine: OrtEngine) -> None:
    feed = plain_feed(engine, IDS[None], np.ones((1, 24), np.int64))
    (last,) = plain_session(folder).run(["logits"], feed)
    np.testing.assert_allclose(last, engine.logits(IDS[None])[:, -1:], atol=1e-5)


def test_of_a_padded_row_it_is_the_last_token_that_is_no_padding(folder: Path, engine: OrtEngine) -> None:
    ids, mask = np.stack([IDS[:12], IDS[12:]]), np.ones((2, 12), np.int64)
    mask[1, 7:] = 0
    (last,) = plain_session(folder).run(["logits"], plain_feed(engine, ids, mask))
    for row, length in enumerate((12, 7)):
        np.testing.assert_allclose(last[row, 0], engine.logits(ids[row : row + 1, :length])[0, -1], atol=1e-4)


def test_what_makes_the_constant_an_input_is_what_onnx_would_write() -> None:
    model = onnx.ModelProto()
    model.graph.input.append(onnx.helper.make_tensor_value_info(LOGITS_AT, TensorProto.INT64, ["logits"]))
    assert model.SerializeToString() == AS_INPUT


def test_a_decoder_that_others_wrote_gives_all_its_logits(folder: Path, engine: OrtEngine, tmp_path: Path) -> None:
    """As onnxruntime-genai's builder writes them: the head reads every token."""
    model = onnx.load(folder / "model.onnx")
    (gather,) = (node for node in model.graph.node if node.op_type == "GatherND")
    for node in model.graph.node:
        node.input[:] = [gather.input[0] if name == gather.output[0] else name for name in node.input]
    kept = [node for node in model.graph.node if not node.name.startswith("logits/")]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    (constant,) = (tensor for tensor in model.graph.initializer if tensor.name == LOGITS_AT)
    model.graph.initializer.remove(constant)
    onnx.save(model, tmp_path / "model.onnx")
    np.testing.assert_array_equal(OrtEngine(tmp_path, threads=1).logits(IDS[None]), engine.logits(IDS[None]))


@pytest.fixture
def cut(folder: Path, tmp_path: Path) -> Path:
    """The artifact with a config that has a prompt read in pieces of five."""
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / GENAI_CONFIG).write_text('{"search": {"chunk_size": 5}}')
    return tmp_path / "cut"


def test_a_prompt_is_read_in_the_pieces_that_the_config_says(
    engine: OrtEngine, cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    append = OrtStream._append

    def counted(stream: OrtStream, ids_T: TokenIds) -> None:
        lengths.append(len(ids_T))
        append(stream, ids_T)

    monkeypatch.setattr(OrtStream, "_append", counted)
    in_pieces = OrtEngine(cut, threads=1)
    stream = in_pieces.stream(capacity=24)
    logits = [stream.feed(IDS[:17]), stream.feed(IDS[17:18]), stream.feed(IDS[18:])]
    assert lengths == [5, 5, 5, 2, 1, 5, 1]
    whole = engine.logits(IDS[None])[0]
    for found, place in zip(logits, (16, 17, 23), strict=True):
        assert np.abs(found - whole[place]).max() < 0.02 * np.abs(whole).max()
    np.testing.assert_array_equal(in_pieces.logits(IDS[None])[0], whole)


@pytest.mark.parametrize("search", ["{}", '{"chunk_size": null}', '{"chunk_size": 0}'])
def test_without_a_size_it_is_read_in_one(cut: Path, search: str) -> None:
    (cut / GENAI_CONFIG).write_text(f'{{"search": {search}}}')
    assert OrtEngine(cut, threads=1).chunk_size is None


@pytest.mark.parametrize("content", ["{", "[]", '{"search": 5}', "{}"])
def test_what_is_no_config_is_refused(cut: Path, content: str) -> None:
    (cut / GENAI_CONFIG).write_text(content)
    with pytest.raises(ArtifactError, match="no config") as caught:
        OrtEngine(cut, threads=1)
    assert caught.value.where == str(cut / GENAI_CONFIG)
