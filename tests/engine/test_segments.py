"""A graph in segments computes what it computes in one."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from llmopt.engine import segments
from llmopt.engine.ort import LOGITS_AT, OrtEngine, open_session
from llmopt.engine.segments import constant_nodes, run_in_segments
from llmopt.errors import ArtifactError
from tests.decoders import write_decoder
from tests.families import CASES, random_weights, spec_of
from tests.onnx_nodes import long_way

WINDOWS = [np.random.default_rng(seed).integers(0, 97, length) for seed, length in enumerate((24, 7))]


@pytest.fixture(scope="module", params=["w4a16", "w8a8", None])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, spec = tmp_path_factory.mktemp("artifact"), spec_of(CASES["llama"])
    write_decoder(folder, spec, random_weights(spec), lambda name: request.param, WINDOWS)
    return folder


def feeds(engine: OrtEngine) -> list[dict[str, object]]:
    empty = np.zeros((1, engine.kv_heads, 0, engine.head_dim), np.float32)
    return [
        dict.fromkeys(engine.past_names, empty)
        | {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64), LOGITS_AT: np.arange(len(ids))}
        for ids in WINDOWS
    ]


def run(folder: Path, segment_nodes: int) -> list[np.ndarray]:
    model = long_way(folder)
    return run_in_segments(
        model, folder, feeds(OrtEngine(folder, threads=1)), "logits", threads=1, segment_nodes=segment_nodes
    )


@pytest.mark.parametrize("segment_nodes", [1, 17, 10_000])
def test_the_output_is_that_of_the_whole_graph(folder: Path, segment_nodes: int) -> None:
    engine = OrtEngine(folder, threads=1)
    for actual, ids in zip(run(folder, segment_nodes), WINDOWS, strict=True):
        np.testing.assert_allclose(actual, engine.logits(ids[None]), atol=1e-5)
        assert actual.shape == (1, len(ids), 97)


def test_no_more_than_a_segment_is_open_and_nothing_is_kept_that_none_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counting(graph: bytes, *rest: object) -> object:
        part = onnx.load_from_string(graph)
        sizes.append(len(part.graph.node) - len(constant_nodes(part)))
        assert {value.name for value in part.graph.input} <= {name for node in part.graph.node for name in node.input}
        assert not any(value.name.startswith("present.") for value in part.graph.output)
        return open_session(graph, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(segments, "open_session", counting)
    run(folder, 17)
    assert max(sizes) == 17
    whole = long_way(folder)
    assert sum(sizes) == len(whole.graph.node) - len(constant_nodes(whole))


def test_what_is_computed_from_tensors_alone_is_a_constant_in_every_segment_that_reads_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales that a kernel reads as a value, not as a constant, make some of onnxruntime's compute nonsense."""
    constants = set(constant_nodes(long_way(folder)))
    found: set[str] = set()

    def looking(graph: bytes, *rest: object) -> object:
        part = onnx.load_from_string(graph)
        assert constants.isdisjoint(value.name for value in [*part.graph.input, *part.graph.output])
        found.update(constant_nodes(part))
        return open_session(graph, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(segments, "open_session", looking)
    run(folder, 1)
    assert found == constants


def test_no_value_keeps_the_memory_of_a_session(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array that onnxruntime gives holds all that its session took."""
    given: list[np.ndarray] = []

    class Watched:
        def __init__(self, *arguments: object) -> None:
            self.session = open_session(*arguments)  # type: ignore[arg-type]

        def run(self, *arguments: object) -> list[np.ndarray]:
            found = self.session.run(*arguments)
            given.extend(found)
            return found

    monkeypatch.setattr(segments, "open_session", Watched)
    for logits in run(folder, 17):
        assert not any(np.shares_memory(logits, array) for array in given)


def test_a_segment_that_does_not_open_names_the_folder(folder: Path) -> None:
    model = long_way(folder)
    model.graph.node[-2].op_type = "NoSuchOperator"
    with pytest.raises(ArtifactError, match="NoSuchOperator") as caught:
        run_in_segments(model, folder, feeds(OrtEngine(folder, threads=1)), "logits", threads=1)
    assert caught.value.where == str(folder)
