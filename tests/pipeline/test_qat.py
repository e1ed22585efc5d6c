"""A quantized model that was trained is nearer to the float one, and what was trained is what ships."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from llmopt.artifact import journal_folder
from llmopt.calibrate.text import Corpus
from llmopt.cli.app import app
from llmopt.cli.outcome import run as run_command
from llmopt.demo import documents
from llmopt.engine.ort import OrtEngine
from llmopt.engine.transformers import TransformersEngine
from llmopt.errors import UsageError
from llmopt.export.onnx.graph import GRAPH_FILE
from llmopt.export.onnx.levels import in_float32
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.source import open_source
from llmopt.pipeline.prepare import prepare
from llmopt.pipeline.qat import run as qat
from llmopt.pipeline.qat.data import TrainingText, require_divisible, training_text
from llmopt.pipeline.qat.options import QatOptions
from llmopt.pipeline.quantize import QuantizeResult, quantize
from llmopt.pipeline.request import QuantizeRequest
from llmopt.pipeline.soundness import open_tokenizer
from llmopt.progress import Silent
from llmopt.quantize.scheme import parse_scheme
from tests.whole_way import bytes_of

TOKENS = 4096
PROMPTS, LENGTH = 20, 64


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Letters in an order that a model can learn something from."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = np.random.default_rng(0)
    letters = "".join(chr(97 + place % 26) for place in generator.integers(1, 6, 20_000).cumsum())
    path.write_text(letters, encoding="utf-8")
    return path


def request(model: Path, output: Path, text: Path, scheme: str = "w4a16", **more: object) -> QuantizeRequest:
    settings = {
        "method": "rtn+qat",
        "training": QatOptions(steps=30, rate=0.005),
        "calib": text,
        "calib_tokens": TOKENS,
    } | more
    return QuantizeRequest(model=str(model), output=output, scheme=parse_scheme(scheme), **settings)


def losses(result: QuantizeResult) -> list[float]:
    """On held-out text, of each evaluation of the first run of training."""
    return [one["loss"] for one in result.report.settings["training"]["held_out"][0]]


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("w4a16", {}),
        ("w2a16", {}),
        ("w4a16-channel-sym", {}),
        ("w8a8", {}),
        ("w4a16", {"lora_rank": 8}),
        ("w4a16", {"cross_entropy": 0.2}),
        ("w4a16", {"precision": "bf16"}),
    ],
)
def test_training_brings_it_nearer_to_the_float_model(tiny_llama, tmp_path, text, scheme, options):
    training = QatOptions(steps=30, rate=0.005, **options)
    result = quantize(request(tiny_llama, tmp_path / "out", text, scheme, training=training))
    found = losses(result)
    assert min(found) < (0.99 if options.get("cross_entropy") else 0.9) * found[0]
    told = result.report.settings["training"]
    assert told["trained_steps"] == 30
    assert told["trained_tokens"] == 30 * 2 * 256
    assert told["tokens_per_s"] > 0
    assert told["peak_rss_bytes"] > 2**20
    layers = result.report.candidates[0].layers
    methods = {layer.name.split(".")[-1]: layer.method for layer in layers}
    assert methods["q_proj"] == methods["down_proj"] == "rtn+qat"
    assert methods["lm_head"] == "rtn"
    assert any("tokens a second" in note for note in result.report.notes)


def test_blocks_by_themselves_come_nearer_to_the_float_ones(tiny_llama, tmp_path, text):
    training = QatOptions(steps=60, rate=0.005, by_block=True)
    result = quantize(request(tiny_llama, tmp_path / "out", text, training=training))
    told = result.report.settings["training"]
    assert len(told["held_out"]) == 2
    ratios = [min(one["loss"] for one in block) / block[0]["loss"] for block in told["held_out"]]
    assert max(ratios) < 0.95
    assert told["trained_steps"] == 60


def test_what_is_no_gain_is_not_kept(tiny_llama, tmp_path, text):
    trained = quantize(request(tiny_llama, tmp_path / "a", text, training=QatOptions(steps=30, rate=0.9)))
    plain = quantize(
        request(tiny_llama, tmp_path / "b", text, method="rtn", training=None, calib=None, calib_tokens=None)
    )
    assert trained.report.settings["training"]["best_steps"] == [0]
    graphs = [bytes_of(result.path)["model.onnx.data"] for result in (trained, plain)]
    assert graphs[0] == graphs[1]
    reasons = {layer.reason for layer in trained.report.candidates[0].layers}
    assert "training was no gain on held-out text" in reasons


def test_the_teacher_stays_frozen(tiny_llama, tmp_path, text, monkeypatch):
    teachers = []

    class Watched(qat.Teacher):
        def __init__(self, engine):
            super().__init__(engine)
            teachers.append(engine)

    monkeypatch.setattr(qat, "Teacher", Watched)
    quantize(request(tiny_llama, tmp_path / "out", text))
    (engine,) = teachers
    with open_checkpoint(open_source(str(tiny_llama))) as checkpoint:
        for tensor in engine.spec.tensors():
            kept = engine._kept[tensor.name]
            assert not kept.requires_grad
            assert kept.grad is None
            assert torch.equal(kept, checkpoint.read(tensor))


def greedy(logits, prompts_BT):
    """What follows each prompt, [prompts, tokens]."""
    ids_BT = prompts_BT
    for _ in range(LENGTH):
        next_B1 = np.asarray(logits(ids_BT))[:, -1:].argmax(-1)
        ids_BT = np.concatenate([ids_BT, next_B1], 1)
    return ids_BT[:, prompts_BT.shape[1] :].tolist()


@pytest.fixture
def students(monkeypatch):
    """The fake quantized models of runs, which they leave as they were at their best."""
    made: list[qat.Student] = []

    class Watched(qat.Student):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            made.append(self)

    monkeypatch.setattr(qat, "Student", Watched)
    return made


def logits_of(student):
    def found(ids_BT):
        with torch.no_grad():
            return student(torch.from_numpy(ids_BT)).numpy()

    return found


def engine_of(folder: Path, *, integers: bool = False):
    """What users run, but for activations that kernels round by themselves; int8 products stay if asked."""
    if not (folder / GRAPH_FILE).exists():
        return TransformersEngine(folder, 1)
    model = onnx.load(folder / GRAPH_FILE, load_external_data=False)
    onnx.save(in_float32(model, integers=integers), folder / GRAPH_FILE)  # accuracy level 0
    return OrtEngine(folder, 1)


@pytest.mark.parametrize(
    ("scheme", "format_"),
    [("w4a16", "onnx"), ("w4a16-sym", "hf"), ("w2a16", "onnx"), ("w2a16", "hf"), ("w8a8", "onnx")],
)
def test_the_artifact_says_what_the_fake_quantized_model_says(  # noqa: PLR0917
    tiny_llama, tmp_path, text, students, scheme, format_
):
    """The same weights; activations of w8a8 are left as they are on both sides."""
    out = tmp_path / "out"
    result = quantize(request(tiny_llama, out, text, scheme, format=format_))
    assert result.report.settings["training"]["best_steps"][0] > 0
    (student,) = students
    for module in (student, *student.blocks):
        module.rounding = lambda x: x
    prompts = np.random.default_rng(1).integers(4, 100, (PROMPTS, 8))
    said = greedy(logits_of(student), prompts)
    assert greedy(engine_of(out).logits, prompts) == said
    assert len({tuple(ids) for ids in said}) > PROMPTS / 2


@pytest.mark.parametrize("format_", ["onnx", "hf"])
def test_so_does_one_whose_activations_are_rounded_but_for_ties(tmp_path, students, format_):
    """Engines add up in another order, so now and then a value is rounded to its other neighbour, and logits move a
    little: what is said may then be another of two words that are as likely.
    """
    out = tmp_path / "out"
    settings = {"method": "rtn+qat", "training": QatOptions(steps=6), "calib_tokens": TOKENS, "format": format_}
    quantize(QuantizeRequest(model="demo", output=out, scheme=parse_scheme("w8a8"), threads=1, **settings))
    tokenizer = open_tokenizer(open_source("demo"))
    prompts = np.array([tokenizer.encode(story.text)[:8] for story in documents("evaluation", PROMPTS)])
    student = logits_of(students[0])
    ids_BT = np.concatenate([prompts, greedy(student, prompts)], 1)
    expected, actual = student(ids_BT), np.asarray(engine_of(out, integers=True).logits(ids_BT))
    chosen_BT1 = actual.argmax(-1)[..., None]
    behind_BT = expected.max(-1) - np.take_along_axis(expected, chosen_BT1, -1)[..., 0]
    assert (behind_BT == 0).mean() > 0.98
    assert behind_BT.max() < 0.1
    assert np.abs(actual - expected).mean() < 0.02


WORDS = ("--scheme", "w4a16", "--method", "rtn+qat", "--steps", "24", "--threads", "1", "--calib-tokens", str(TOKENS))


def words(model: Path, out: Path, text: Path) -> list[str]:
    return ["quantize", str(model), "-o", str(out), *WORDS, "--calib", str(text)]


def test_kill_9_in_the_middle_changes_nothing(tiny_llama, tmp_path, text):
    assert run_command(app, words(tiny_llama, tmp_path / "undisturbed", text)) == 0
    out = tmp_path / "out"
    program = "import llmopt.pipeline.qat.run as qat, sys; qat.CHECKPOINT_SECONDS = 0.0; "
    program += "from llmopt.__main__ import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words(tiny_llama, out, text)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any(int(path.name.split("training-")[1].split(".")[0]) >= 5 for path in indices(out)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert 5 <= max(int(path.name.split("training-")[1].split(".")[0]) for path in indices(out)) < 24
    assert run_command(app, [*words(tiny_llama, out, text), "--resume"]) == 0
    expected, found = bytes_of(tmp_path / "undisturbed"), bytes_of(out)
    for files in (expected, found):
        files.pop("README.md")
        held_out = json.loads(files.pop("report.json"))["settings"]["training"]["held_out"]
        files["losses"] = json.dumps(held_out).encode()
    assert found == expected


def indices(out: Path) -> list[Path]:
    """The indices of the checkpoints that were finished."""
    return list(journal_folder(out).glob("*training-*.json.seal.json"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"method": "rtn", "calib": None, "calib_tokens": None}, "does not train"),
        ({"method": "qat", "training": QatOptions(cross_entropy=2.0)}, "cross entropy"),
        ({"method": "qat", "training": QatOptions(cross_entropy=0.5, by_block=True)}, "no tokens"),
        ({"method": "qat", "training": QatOptions(precision="fp8")}, "no precision"),
        ({"method": "qat", "training": QatOptions(rate=0.0)}, "a rate of 0"),
        ({"method": "qat+gptq"}, "qat"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is_read(tiny_llama, tmp_path, text, changed, told):
    with pytest.raises(UsageError, match=told):
        prepare(request(tiny_llama, tmp_path / "out", text, **changed), Silent())


def test_other_training_makes_another_artifact(tiny_llama, tmp_path, text):
    keys = {
        prepare(request(tiny_llama, tmp_path / "out", text, training=options), Silent()).manifest().key
        for options in (QatOptions(steps=1), QatOptions(steps=2), QatOptions(steps=1, lora_rank=2), None)
    }
    assert len(keys) == 4


def test_minutes_are_for_training_as_well(tiny_llama, tmp_path, text):
    options = QatOptions(batch=2)
    result = quantize(request(tiny_llama, tmp_path / "out", text, minutes=0.05, training=options))
    told = result.report.settings["training"]
    assert 0 < told["seconds"] < 4.0
    assert told["trained_steps"] > 2


def test_windows_come_once_before_any_comes_again():
    ids_NT = torch.arange(6)[:, None].expand(6, 4)
    steps = TrainingText(ids_NT, ids_NT[:1]).batches(0, windows=2, ranks=1, seed=0)
    epochs = [sorted(int(row) for _ in range(3) for batch in next(steps) for row in batch[:, 0]) for _ in range(2)]
    assert epochs == [list(range(6))] * 2
    later = TrainingText(ids_NT, ids_NT[:1]).batches(4, windows=2, ranks=1, seed=0)
    again = TrainingText(ids_NT, ids_NT[:1]).batches(0, windows=2, ranks=1, seed=0)
    for _ in range(4):
        next(again)
    assert torch.equal(torch.cat(next(later)), torch.cat(next(again)))


def test_held_out_windows_are_not_learnt_from(tiny_llama):
    source = open_source(str(tiny_llama))
    corpus = Corpus("text", ("".join(chr(97 + place % 26) for place in range(256 * 20)),))
    found = training_text(corpus, source.spec, open_tokenizer(source))
    assert (len(found.learnt_NT), len(found.held_out_NT)) == (18, 2)
    with pytest.raises(UsageError, match="two windows"):
        training_text(Corpus("text", ("abc",)), source.spec, open_tokenizer(source))


def test_windows_have_to_divide_among_processes():
    require_divisible(4, 2)
    with pytest.raises(UsageError, match="do not divide"):
        require_divisible(3, 2)
