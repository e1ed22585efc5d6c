"""What is clearly fastest is chosen, once for a machine, and again by a run that goes on."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from llmopt.artifact import Journal
from llmopt.engine.base import Logits, TokenIds
from llmopt.engine.ort import OrtStream
from llmopt.export.onnx.kernels import Shape, candidates
from llmopt.measure import interleaved
from llmopt.pipeline import tuning as tuning_module
from llmopt.pipeline.tuning import Tuning, clearly_fastest, time_kernels, timings_file, tuning
from llmopt.progress import Silent
from llmopt.quantize.scheme import parse_scheme
from tests.decoders import write_decoder
from tests.families import CASES, random_weights, spec_of

REALLY = interleaved.fastest_ms  # before any test replaces it
SHAPE = Shape(scheme=parse_scheme("w4a16"), rows=64, columns=64)
INT8, FLOAT32 = (kernel.name for kernel in candidates(SHAPE))


class Told(Silent):
    """What was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, float]]]:
    """Times to be measured, one after the other; what was not asked for is left."""
    coming: list[dict[str, float]] = []
    monkeypatch.setattr(tuning_module, "time_kernels", lambda shape, kernels, threads: coming.pop(0))
    yield coming
    assert coming == []


def of_machine(journal: Journal | None = None, progress: Silent | None = None) -> Tuning:
    return tuning(1, journal, progress or Silent())


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"default": 10.0, "other": 9.0}, "other"),
        ({"default": 10.0, "other": 9.2}, "default"),
        ({"default": 10.0, "other": 5.0, "third": 4.0}, "third"),
        ({"default": 1.0, "other": 5.0}, "default"),
    ],
)
def test_another_than_the_default_is_clearly_faster_or_not_chosen(times: Mapping[str, float], chosen: str) -> None:
    assert clearly_fastest(times) == chosen


def test_a_kernel_that_is_faster_is_measured_again_and_chosen(measured: list[dict[str, float]]) -> None:
    measured += [{INT8: 8.0, FLOAT32: 4.0}, {INT8: 7.0, FLOAT32: 5.0}]
    found = of_machine()
    assert found.kernel(SHAPE).name == FLOAT32
    (choice,) = found.to_json()["choices"]
    assert choice == {"name": SHAPE.name, "chosen": FLOAT32, "milliseconds": {INT8: 7.0, FLOAT32: 4.0}}


def test_what_noise_made_faster_once_is_not(measured: list[dict[str, float]]) -> None:
    measured += [{INT8: 8.0, FLOAT32: 4.0}, {INT8: 3.0, FLOAT32: 5.0}]
    assert of_machine().kernel(SHAPE).name == INT8


def test_it_is_measured_once_for_a_machine(measured: list[dict[str, float]]) -> None:
    measured += [{INT8: 4.0, FLOAT32: 8.0}]
    first = of_machine()
    assert [first.kernel(SHAPE).name for _ in range(3)] == [INT8] * 3
    later = Told()
    assert of_machine(progress=later).kernel(SHAPE).name == INT8
    assert later.lines == []


def test_other_threads_are_another_machine() -> None:
    assert timings_file(1) != timings_file(2)


def test_a_head_is_another_product_than_one_of_every_token() -> None:
    head = Shape(scheme=SHAPE.scheme, rows=64, columns=64, every_token=False)
    assert head.name != SHAPE.name


@pytest.mark.parametrize("content", ["{", "[]", '{"x": {"a": "fast"}}', '{"x": {"a": -1.0}}', '{"x": {"a": NaN}}'])
def test_a_damaged_file_is_made_anew_and_that_is_said(content: str, measured: list[dict[str, float]]) -> None:
    measured += [{INT8: 4.0, FLOAT32: 8.0}]
    file = timings_file(1)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    told = Told()
    assert of_machine(progress=told).kernel(SHAPE).name == INT8
    assert f"{file} cannot be read" in told.lines[0]
    assert json.loads(file.read_text()) == {SHAPE.name: {INT8: 4.0, FLOAT32: 8.0}}


def test_times_of_other_candidates_are_measured_anew(measured: list[dict[str, float]]) -> None:
    measured += [{INT8: 4.0, FLOAT32: 8.0}]
    file = timings_file(1)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({SHAPE.name: {"of an earlier llmopt": 1.0}, "kept": {"a": 1.0}}))
    assert of_machine().kernel(SHAPE).name == INT8
    assert json.loads(file.read_text()) == {SHAPE.name: {INT8: 4.0, FLOAT32: 8.0}, "kept": {"a": 1.0}}


def test_a_cache_that_cannot_be_written_costs_no_more_than_time(measured: list[dict[str, float]]) -> None:
    measured += [{INT8: 4.0, FLOAT32: 8.0}]
    timings_file(1).parent.parent.mkdir(parents=True)
    timings_file(1).parent.write_text("a file where the folder should be")
    told = Told()
    assert of_machine(progress=told).kernel(SHAPE).name == INT8
    assert "the next run measures again" in told.lines[-1]


def test_a_run_that_goes_on_chooses_as_before_whatever_the_cache_says(
    tmp_path: Path, measured: list[dict[str, float]]
) -> None:
    measured += [{INT8: 8.0, FLOAT32: 4.0}] * 2
    journal = Journal(tmp_path)
    assert of_machine(journal).kernel(SHAPE).name == FLOAT32
    timings_file(1).write_text(json.dumps({SHAPE.name: {INT8: 1.0, FLOAT32: 9.0}}))
    assert of_machine(journal).kernel(SHAPE).name == FLOAT32
    assert of_machine().kernel(SHAPE).name == INT8


def test_what_came_from_the_cache_is_in_the_journal_too(tmp_path: Path, measured: list[dict[str, float]]) -> None:
    measured += [{INT8: 8.0, FLOAT32: 4.0}] * 2
    of_machine().kernel(SHAPE)
    journal = Journal(tmp_path)
    of_machine(journal).kernel(SHAPE)
    timings_file(1).unlink()
    assert of_machine(journal).kernel(SHAPE).name == FLOAT32


def test_kernels_are_really_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "fastest_ms", REALLY)
    kernels = {kernel.name: kernel for kernel in candidates(SHAPE)}
    found = time_kernels(SHAPE, kernels, threads=1)
    assert list(found) == [INT8, FLOAT32]
    assert all(0 < milliseconds < 1000 for milliseconds in found.values())


@pytest.mark.parametrize(("times", "chunk"), [((10.0, 8.0, 9.0), 8), ((10.0, 9.5, 9.5), None), ((9.0, 8.0, 5.0), 4)])
def test_a_prompt_is_read_in_the_pieces_that_are_fastest(
    times: tuple[float, ...], chunk: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(CASES["mistral"])
    write_decoder(tmp_path, spec, random_weights(spec), lambda name: None, [np.arange(3)])
    monkeypatch.setattr(tuning_module, "PROMPT", 16)
    monkeypatch.setattr(tuning_module, "CHUNKS", (8, 4))
    fed: list[int] = []
    feed = OrtStream.feed

    def counted(stream: OrtStream, ids_T: TokenIds) -> Logits:
        fed.append(len(ids_T))
        return feed(stream, ids_T)

    def fastest_ms(calls: list, budget_s: float) -> list[float]:
        fed.clear()
        for call in calls:
            call()
        return list(times)

    monkeypatch.setattr(OrtStream, "feed", counted)
    monkeypatch.setattr(interleaved, "fastest_ms", fastest_ms)
    assert of_machine().chunk("a model", tmp_path, spec.vocab_size) == chunk
    assert fed == [16, 8, 8, 4, 4, 4, 4]
