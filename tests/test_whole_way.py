"""From a model to a verdict, through the command line, on the embedded model and on damaged copies of it."""

import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt import demo
from llmopt.artifact import load_manifest
from llmopt.calibrate.text import built_in
from llmopt.pipeline.reconstruct import Learning, Reconstruction
from llmopt.report.results import TIMING_METRICS
from tests.whole_way import CommandLine, bytes_of

BRIEF = Learning(steps=2)
ACCURACY = ("--tokens", "2048", "--no-latency", "--threads", "1")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def llmopt(capfd, cache, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", str(cache))
    return CommandLine(capfd)


@pytest.fixture(scope="session")
def int4(tmp_path_factory):
    """The embedded model with 4-bit weights; copy it to change it."""
    from llmopt.pipeline.quantize import quantize
    from llmopt.pipeline.request import QuantizeRequest
    from llmopt.quantize.scheme import parse_scheme

    folder = tmp_path_factory.mktemp("artifacts") / "int4"
    quantize(QuantizeRequest(model="demo", output=folder, scheme=parse_scheme("w4a16")))
    return folder


@pytest.fixture
def damaged(tmp_path):
    """A copy of the embedded model, to be damaged."""
    folder = tmp_path / "damaged"
    shutil.copytree(demo.folder(), folder)
    return folder


def rewrite(folder, change):
    """Change the weights of a model."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def only_entry(folder, name):
    """Nothing but `name` is in the folder, hidden files counted."""
    return {path.name for path in folder.iterdir()} == {name}


class TestQuantize:
    def test_every_layer_is_told_with_its_scheme_or_the_reason(self, llmopt, tmp_path):
        options = ("--scheme", "w4a16", "--override", "layers.0.*=w8a16", "--ignore", "layers.1.mlp.*")
        ended = llmopt("quantize", "demo", "-o", tmp_path / "out", *options, "--json")
        assert ended.code == 0
        layers = {layer["name"]: layer for layer in json.loads(ended.out)["candidates"][0]["layers"]}
        assert layers["model.layers.0.mlp.up_proj"]["scheme"] == "w8a16-g64-sym"
        assert layers["model.layers.1.self_attn.q_proj"]["scheme"] == "w4a16-g32-asym"
        assert layers["model.layers.1.mlp.up_proj"]["scheme"] is None
        assert "ignored" in layers["model.layers.1.mlp.up_proj"]["reason"]
        assert layers["lm_head"]["scheme"] == "w8a16-g64-sym"
        assert "lm_head" in layers["model.embed_tokens"]["reason"]
        assert all(layer["reason"] for layer in layers.values() if layer["scheme"] is None)

    def test_two_runs_write_the_same_bytes(self, llmopt, int4, tmp_path):
        assert llmopt("quantize", "demo", "-o", tmp_path / "int4", "--scheme", "w4a16", "--threads", "1").code == 0
        first, second = bytes_of(int4), bytes_of(tmp_path / "int4")
        reports = [json.loads(files.pop("report.json")) for files in (first, second)]
        assert first == second
        assert reports[0] | {"host": None} == reports[1] | {"host": None}

    def test_a_calibrated_method_says_what_it_read_and_beats_rounding(self, llmopt, tmp_path):
        for method in ("rtn", "search", "gptq"):
            options = ("--scheme", "w4a16-sym", "--method", method, "--threads", "1", "--json")
            ended = llmopt("quantize", "demo", "-o", tmp_path / method, *options)
            assert ended.code == 0
            report = json.loads(ended.out)
            layers = {layer["name"]: layer["method"] for layer in report["candidates"][0]["layers"]}
            assert layers["model.layers.3.mlp.down_proj"] == method
            assert layers["lm_head"] == "rtn"  # it is the table, which nothing enters
            assert ("calibration" in report["settings"]) == (method != "rtn")
        assert report["settings"]["calibration"]["tokens"] == 32768
        paths = [tmp_path / method for method in ("gptq", "rtn")]
        measured = json.loads(llmopt("bench", *paths, "--tokens", "8192", *ACCURACY[2:], "--json").out)
        gptq, rtn = (candidate["metrics"]["kl_divergence"]["value"] for candidate in measured["candidates"])
        assert gptq < 0.8 * rtn
        kept = json.loads((tmp_path / "gptq" / "report.json").read_text())
        assert kept["settings"]["calibration"]["text"] == "built-in demo text for calibration"

    def test_auto_says_what_each_layer_got_in_the_time_and_beats_rounding(self, llmopt, tmp_path, monkeypatch):
        monkeypatch.setattr("llmopt.pipeline.parts.Reconstruction", functools.partial(Reconstruction, learning=BRIEF))
        options = ("--scheme", "w4a16-sym", "--method", "auto", "--calib-tokens", "4096", "--threads", "1", "--json")
        ended = llmopt("quantize", "demo", "-o", tmp_path / "auto", *options)
        assert ended.code == 0
        assert "minutes" not in ended.out
        assert llmopt("quantize", "demo", "-o", tmp_path / "rtn", *options[:2], "--threads", "1").code == 0
        paths = [tmp_path / method for method in ("auto", "rtn")]
        measured = json.loads(llmopt("bench", *paths, *ACCURACY, "--json").out)
        auto, rtn = (candidate["metrics"]["kl_divergence"]["value"] for candidate in measured["candidates"])
        assert auto < 0.8 * rtn
        ended = llmopt("quantize", "demo", "-o", tmp_path / "hasty", *options, "--minutes", "0.001")
        report = json.loads(ended.out)
        layers = {layer["name"]: layer for layer in report["candidates"][0]["layers"]}
        last = layers["model.layers.3.mlp.down_proj"]
        assert last["method"] == min(last["held_out_errors"], key=last["held_out_errors"].get)
        assert last["reason"] == "least error on held-out text; no time for gptq"
        assert "and for 0 to learn as a whole" in " ".join(report["notes"])
        assert "more than the 0.001 that were given" in " ".join(report["notes"])
        assert "--minutes 0.001" in (tmp_path / "hasty" / "README.md").read_text()

    def test_what_is_calibrated_on_is_part_of_what_an_artifact_is(self, llmopt, tmp_path):
        text = tmp_path / "text.txt"
        keys = []
        for count in (200, 300):
            text.write_text("".join(built_in("calibration", count).documents))
            options = ("--method", "search", "--calib", text, "--calib-tokens", "1500", "--threads", "1", "--force")
            assert llmopt("quantize", "demo", "-o", tmp_path / "out", *options).code == 0
            keys.append(load_manifest(tmp_path / "out").key)
        assert keys[0] != keys[1]

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["--method", "rtn", "--calib", "text.txt"], "reads no text"),
            (["--method", "gptq", "--calib", "none.txt"], "none.txt"),
            (["--method", "gptq", "--calib-tokens", "100"], "640 inputs"),
            (["--method", "gtpq"], "did you mean 'gptq'?"),
            (["--method", "gptq", "--minutes", "5"], "only auto and qat make do with some minutes"),
            (["--method", "auto", "--minutes", "-1"], "-1 minutes are no time"),
        ],
    )
    def test_mistakes_about_calibration_are_told(self, llmopt, tmp_path, monkeypatch, words, told):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "text.txt").write_text("Once.")
        ended = llmopt("quantize", "demo", "-o", tmp_path / "out", *words)
        assert ended.code == 2
        assert told in ended.err
        assert only_entry(tmp_path, "text.txt")

    @pytest.mark.parametrize("dry", [(), ("--dry-run",)])
    def test_tensors_that_the_model_does_not_use_are_named(self, llmopt, damaged, tmp_path, dry):
        extra = {f"vision.{number}.weight": torch.ones(2) for number in range(5)}
        rewrite(damaged, lambda weights: weights.update(extra))
        ended = llmopt("quantize", damaged, "-o", tmp_path / "out", "--threads", "1", "--json", *dry)
        (note,) = json.loads(ended.out)["notes"]
        assert "5 tensors that the model does not use: vision.0.weight, vision.1.weight," in note
        assert note.endswith("and 2 more")

    def test_a_dry_run_foresees_what_would_stop_the_real_one(self, llmopt, tmp_path, monkeypatch):
        options = ("quantize", "demo", "-o", tmp_path / "out", "--dry-run")
        few = llmopt(*options, "--method", "gptq", "--calib-tokens", "100")
        assert (few.code, "640 inputs" in few.err) == (2, True)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
        full = llmopt(*options)
        assert (full.code, "the disk has no room" in full.err) == (3, True)

    def test_a_dry_run_names_the_method_that_each_layer_will_get(self, llmopt, tmp_path):
        def methods(*words):
            ended = llmopt("quantize", "demo", "-o", tmp_path / "out", "--scheme", "w4a16", *words, "--json")
            content = json.loads(ended.out)
            layers = content.get("layers") or content["candidates"][0]["layers"]
            return {layer["name"]: layer["method"] for layer in layers}

        planned = methods("--dry-run", "--method", "gptq")
        assert planned.pop("model.embed_tokens") == planned.pop("lm_head") == "rtn"
        assert set(planned.values()) == {"gptq"}
        small = ("--override", "lm_head=w4a16", "--method", "search", "--threads", "1")
        assert methods("--dry-run", *small) == methods(*small)

    def test_an_artifact_is_no_model(self, llmopt, int4, tmp_path):
        ended = llmopt("quantize", int4, "-o", tmp_path / "out")
        assert ended.code == 2
        assert "this is an artifact of llmopt" in ended.err
        assert "give its source, demo" in ended.err

    def test_a_dry_run_writes_nothing(self, llmopt, tmp_path):
        ended = llmopt("quantize", "demo", "-o", tmp_path / "out", "--dry-run", "--json")
        assert ended.code == 0
        assert json.loads(ended.out)["estimated_bytes"] > 1_000_000
        assert not list(tmp_path.iterdir())

    def test_what_stands_at_the_output_is_left_alone(self, llmopt, int4, tmp_path):
        folder = shutil.copytree(int4, tmp_path / "int4")
        before = bytes_of(folder)
        ended = llmopt("quantize", "demo", "-o", folder)
        assert ended.code == 3
        assert "--force" in ended.err
        assert bytes_of(folder) == before
        assert llmopt("quantize", "demo", "-o", folder, "--force", "--threads", "1").code == 0
        assert load_manifest(folder, verify=True).scheme == "w8a16-g64-sym"

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["--scheme", "w3a16"], "w3a16"),
            (["--method", "rtm"], "rtn"),
            (["--ignore", "down_prj"], "down_proj"),
            (["--override", "lm_head"], "PATTERN=SCHEME"),
            (["--override", "lm_head=w8a16", "--override", "embed_tokens=w4a16"], "tied"),
            (["--format", "gguf"], "onnx"),
            (["--shceme", "w8a16"], "--scheme"),
            (["-o", ""], "name one: -o OUT"),
        ],
    )
    def test_a_mistake_on_the_command_line_is_told_before_anything_is_written(self, llmopt, tmp_path, words, told):
        ended = llmopt("quantize", "demo", "-o", tmp_path / "out", *words)
        assert ended.code == 2
        assert told in ended.err
        assert not list(tmp_path.iterdir())


class TestDamagedModels:
    """Each ends in one clear error that names the tensor or the file, with exit code 3, and leaves nothing behind."""

    def assert_refused(self, llmopt, damaged, told):
        ended = llmopt("quantize", damaged, "-o", damaged.parent / "out", "--threads", "1")
        assert ended.code == 3, ended.err
        assert ended.err.count("error:") == 1
        assert told in ended.err
        assert "Traceback" not in ended.err
        assert only_entry(damaged.parent, "damaged")

    def test_a_value_that_is_not_a_number_in_the_last_block(self, llmopt, damaged):
        name = "model.layers.3.mlp.down_proj.weight"

        def change(weights):
            weights[name][5, 7] = float("nan")

        rewrite(damaged, change)
        self.assert_refused(llmopt, damaged, name)

    def test_an_infinite_value_in_the_table(self, llmopt, damaged):
        def change(weights):
            weights["model.embed_tokens.weight"][3, 1] = float("inf")

        rewrite(damaged, change)
        self.assert_refused(llmopt, damaged, "model.embed_tokens.weight")

    def test_a_missing_tensor(self, llmopt, damaged):
        name = "model.layers.2.self_attn.o_proj.weight"
        rewrite(damaged, lambda weights: weights.pop(name))
        self.assert_refused(llmopt, damaged, name)

    def test_a_tensor_of_the_wrong_shape(self, llmopt, damaged):
        name = "model.layers.1.mlp.gate_proj.weight"
        rewrite(damaged, lambda weights: weights.update({name: torch.zeros(8, 8)}))
        self.assert_refused(llmopt, damaged, name)

    def test_a_truncated_file(self, llmopt, damaged):
        with (damaged / "model.safetensors").open("r+b") as file:
            file.truncate(100_000)
        self.assert_refused(llmopt, damaged, "model.safetensors")

    def test_an_index_that_leaves_the_folder(self, llmopt, damaged):
        (damaged / "model.safetensors").unlink()
        index = {"weight_map": {"model.norm.weight": "../../other.safetensors"}}
        (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
        self.assert_refused(llmopt, damaged, "../../other.safetensors")

    def test_pickled_weights(self, llmopt, damaged):
        (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
        self.assert_refused(llmopt, damaged, "save_pretrained")

    def test_no_tokenizer(self, llmopt, damaged):
        for kept in ("tokenizer_config.json", None):
            for path in damaged.glob("*token*"):
                if path.name != kept:
                    path.unlink()
            self.assert_refused(llmopt, damaged, f"the model has no tokenizer\n  in: {damaged}\n")
            ended = llmopt("bench", damaged, "--baseline", damaged, *ACCURACY)
            assert f"the model has no tokenizer\n  in: {damaged}\n" in ended.err

    def test_an_unknown_family(self, llmopt, damaged):
        config = json.loads((damaged / "config.json").read_text())
        (damaged / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
        self.assert_refused(llmopt, damaged, "'llama'")

    def test_no_model_at_all(self, llmopt, tmp_path):
        ended = llmopt("quantize", tmp_path / "nothing", "-o", tmp_path / "out")
        assert ended.code == 3
        assert "nothing" in ended.err


def test_a_full_disk_leaves_nothing_behind(llmopt, tmp_path, monkeypatch):
    from llmopt.export.onnx.graph import DataFile

    def no_space(self, name, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DataFile, "add", no_space)
    ended = llmopt("quantize", "demo", "-o", tmp_path / "out")
    assert ended.code == 3
    assert "disk is full" in ended.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_leaves_no_artifact_and_can_be_run_again(llmopt, tmp_path, sent, code):
    command = [sys.executable, "-m", "llmopt", "quantize", "demo", "-o", str(tmp_path / "out"), "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*")):
        assert process.poll() is None, "it ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, sent)
    assert process.wait() == code
    assert not (tmp_path / "out").exists()
    assert llmopt("quantize", "demo", "-o", tmp_path / "out", "--threads", "1").code == 0
    assert only_entry(tmp_path, "out")


class TestBench:
    def test_an_artifact_against_itself_changes_nothing(self, llmopt, int4, tmp_path):
        folder = shutil.copytree(int4, tmp_path / "int4")
        command = ["bench", folder, "--baseline", folder, "--json", *ACCURACY[:2], "--threads", "1"]
        for seed in (0, 1):  # one interval in twenty is meant to miss
            ended = llmopt(*command, "--rounds", "3", "--seed", seed)
            assert ended.code == 0
            deltas = json.loads(ended.out)["candidates"][0]["deltas"]
            assert {name for name, delta in deltas.items() if delta is None} == {"kl_divergence", "top1_agreement"}
            judged = {name: delta for name, delta in deltas.items() if delta is not None and delta["low"] is not None}
            assert judged.keys() >= {"perplexity", "ttft_ms", "tpot_ms", "peak_rss_bytes"}
            assert all(delta["detectable"] is not None for delta in judged.values())
            assert judged["perplexity"]["low"] <= 0 <= judged["perplexity"]["high"]
            missed = {name: delta for name, delta in judged.items() if not delta["low"] <= 0 <= delta["high"]}
            if not missed:
                return
        pytest.fail(f"twice in a row: {missed}")

    def test_the_artifact_keeps_what_was_measured_and_stays_whole(self, llmopt, int4, tmp_path):
        folder = shutil.copytree(int4, tmp_path / "int4")
        assert llmopt("bench", folder, *ACCURACY).code == 0  # the baseline is the source that the manifest names
        report = json.loads((folder / "report.json").read_text())
        assert report["candidates"][0]["metrics"]["perplexity"]["n"] > 1000
        assert report["candidates"][0]["metrics"]["tpot_ms"] is None
        assert report["candidates"][0]["layers"]
        assert "perplexity" in (folder / "README.md").read_text()
        load_manifest(folder, verify=True)

    @pytest.mark.parametrize(
        ("promise", "ends"),
        [
            ("perplexity <= +50%", (0, "pass")),
            ("size_bytes <= 1MB", (1, "fail")),
            ("perplexity <= 1", (1, "fail")),
        ],
    )
    def test_a_promise_becomes_an_exit_code(self, llmopt, int4, promise, ends):
        ended = llmopt("bench", int4, "--assert", promise, "--json", "--no-save", *ACCURACY)
        (gate,) = json.loads(ended.out)["gates"]
        assert (ended.code, gate["verdict"]) == ends

    def test_a_text_of_one_window_decides_nothing(self, llmopt, int4, tmp_path):
        (tmp_path / "short.txt").write_text("In the morning the farmer went to the market. " * 10)
        options = ("--text", tmp_path / "short.txt", "--json", "--no-save", *ACCURACY)
        ended = llmopt("bench", int4, "--assert", "perplexity <= +50%", *options)
        assert ended.code == 4
        report = json.loads(ended.out)
        assert [gate["verdict"] for gate in report["gates"]] == ["inconclusive"]

    def test_a_damaged_artifact_is_neither_measured_nor_used(self, llmopt, int4, tmp_path):
        folder = shutil.copytree(int4, tmp_path / "int4")
        with (folder / "model.onnx.data").open("r+b") as file:
            file.seek(1_000_000)
            byte = file.read(1)
            file.seek(1_000_000)
            file.write(bytes([byte[0] ^ 1]))
        for words in (("bench", folder, *ACCURACY), ("generate", folder, "In the morning")):
            ended = llmopt(*words)
            assert ended.code == 3, words
            assert "its hash differs" in ended.err
            assert "model.onnx.data" in ended.err

    def test_nothing_is_saved_where_that_was_asked_for_and_a_lost_measurement_is_named(self, llmopt, int4, tmp_path):
        folder = shutil.copytree(int4, tmp_path / "int4")
        unmeasured = bytes_of(folder)
        assert llmopt("bench", folder, "--no-save", *ACCURACY).code == 0
        assert bytes_of(folder) == unmeasured
        assert "which is replaced" not in llmopt("bench", folder, *ACCURACY).err
        ended = llmopt("bench", folder, *ACCURACY[2:], "--tokens", "600")
        assert "its report held a larger measurement (2,044 tokens, now 598), which is replaced" in ended.err

    def test_sizes_alone_replace_no_report(self, llmopt, int4):
        before = bytes_of(int4)
        assert llmopt("bench", int4, "--no-accuracy", "--no-latency").code == 0
        assert bytes_of(int4) == before

    def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(self, llmopt, int4, monkeypatch):
        may = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(int4) and may(path, mode))
        ended = llmopt("bench", int4, *ACCURACY)
        assert ended.code == 3
        assert "--no-save" in ended.err

    def test_a_table_goes_into_a_folder_that_is_there(self, llmopt, int4, tmp_path):
        ended = llmopt("bench", *ACCURACY, int4, "--markdown", tmp_path / "no folder" / "t.md")
        assert ended.code == 3
        assert f"mkdir -p '{tmp_path / 'no folder'}'" in ended.err

    def test_mistakes_are_told(self, llmopt, int4, tmp_path):
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "bytes.txt").write_bytes(b"\x00\xff")
        for words, told in (
            ([int4, "--assert", "perplexty <= 1"], "perplexity"),
            ([int4, "--text", tmp_path / "none.txt"], "none.txt"),
            ([int4, "--text", tmp_path / "empty.txt"], "empty.txt"),
            ([int4, int4], "int4"),
            ([int4, "--text", tmp_path / "bytes.txt"], "holds zero bytes"),
            ([tmp_path / "nowhere"], "there is no such folder"),
            ([int4, "--assert", "tpot_ms <= 0.8x"], "leave --no-latency out"),
            ([int4, "--no-accuracy", "--assert", "perplexity <= +1%"], "leave --no-accuracy out"),
            ([int4, "--window", "5000"], "the model reads 1024"),
            ([int4, "--latency", "--prompt", "2000", "--no-accuracy"], "the model reads 1024"),
        ):
            ended = llmopt("bench", *ACCURACY, *words)
            assert ended.code == 2, words
            assert told in ended.err


RECIPE = """\
schema: llmopt.recipe/1
model: demo
output: {output}
threads: 1
steps:
  - quantize: {{name: int8, scheme: w8a16}}
bench: {{tokens: 2048, prompt: 16, output: 4, rounds: 1}}
gates:
  - {gate}
"""


class TestRun:
    def recipe(self, tmp_path, gate="size_bytes <= -50%", output="out"):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(output=tmp_path / output, gate=gate))
        return path

    @pytest.mark.parametrize(
        ("gate", "code"),
        [
            ("size_bytes <= -50%", 0),
            ("perplexity <= -50%", 1),
            # One round of one process has no interval, so nothing can be promised of its times.
            ("tpot_ms <= 0.5x", 4),
        ],
    )
    def test_each_verdict_has_its_exit_code(self, llmopt, tmp_path, gate, code):
        assert llmopt("run", self.recipe(tmp_path, gate)).code == code

    def test_a_step_that_is_done_is_not_done_again(self, llmopt, tmp_path):
        recipe = self.recipe(tmp_path)
        assert llmopt("run", recipe).code == 0
        graph = tmp_path / "out" / "int8" / "model.onnx"
        before = graph.stat().st_ino
        again = llmopt("run", recipe)
        assert again.code == 0
        assert "kept" in again.err
        assert graph.stat().st_ino == before
        other = ("--set", "steps.0.quantize.scheme=w4a16")
        refused = llmopt("run", recipe, *other)
        assert refused.code == 3
        assert "scheme w8a16-g64-sym and not w4a16-g32-asym\n" in refused.err
        assert "--force" in refused.err
        assert llmopt("run", recipe, *other, "--dry-run").code == 3
        assert "int8 is there already" in llmopt("run", recipe, "--dry-run").out
        assert llmopt("run", recipe, *other, "--force").code == 0
        assert load_manifest(graph.parent).scheme == "w4a16-g32-asym"

    def test_two_runs_write_the_same_bytes_but_for_timings(self, llmopt, tmp_path):
        folders = []
        for name in ("a", "b"):
            assert llmopt("run", self.recipe(tmp_path, output=name)).code == 0
            folders.append(bytes_of(tmp_path / name))
        reports = [[json.loads(files.pop(path)) for path in ("report.json", "int8/report.json")] for files in folders]
        assert folders[0] == folders[1]
        first, second = ([timeless(report) for report in pair] for pair in reports)
        assert first == second

    def test_a_mistyped_key_is_told_with_its_line(self, llmopt, tmp_path):
        recipe = self.recipe(tmp_path)
        recipe.write_text(recipe.read_text().replace("scheme: w8a16", "shceme: w8a16"))
        ended = llmopt("run", recipe)
        assert ended.code == 2
        assert "recipe.yaml:6" in ended.err
        assert "did you mean 'scheme'" in ended.err

    def test_a_gate_about_no_step_is_told(self, llmopt, tmp_path):
        recipe = self.recipe(tmp_path, '{candidate: int9, assert: "perplexity <= +1%"}')
        ended = llmopt("run", recipe, "--dry-run")
        assert ended.code == 2
        assert "int9" in ended.err

    def test_a_dry_run_says_what_would_be_done_and_writes_nothing(self, llmopt, tmp_path):
        ended = llmopt("run", self.recipe(tmp_path), "--dry-run")
        assert ended.code == 0
        assert "int8" in ended.out + ended.err
        assert only_entry(tmp_path, "recipe.yaml")


def timeless(report):
    """A report without what depends on the machine and the moment."""
    subjects = [report["baseline"], *report["candidates"]]
    for subject in subjects:
        for metric in TIMING_METRICS:
            subject["metrics"][metric] = None
            subject.get("deltas", {}).pop(metric, None)
        subject["extra"] = {
            name: value for name, value in subject["extra"].items() if name.startswith(("kl_", "perplexity"))
        }
        subject["path"] = None
    report["settings"].pop("latency")
    return report | {"host": None, "notes": None}


def prompt_of(folder, prompt, system):
    """What the model reads, as text."""
    from llmopt.model.tokenizer import Tokenizer
    from llmopt.pipeline.generate import GenerateRequest, prompt_ids

    tokenizer = Tokenizer.from_folder(folder)
    return tokenizer.decode(prompt_ids(GenerateRequest(model=str(folder), prompt=prompt, system=system), tokenizer))


def first_token(folder, prompt):
    """What the model says first, as a token."""
    import numpy as np

    from llmopt.engine.ort import OrtEngine
    from llmopt.model.tokenizer import Tokenizer
    from llmopt.pipeline.generate import GenerateRequest, prompt_ids

    ids = prompt_ids(GenerateRequest(model=str(folder), prompt=prompt), Tokenizer.from_folder(folder))
    return int(OrtEngine(folder, threads=1).stream(len(ids)).feed(np.array(ids)).argmax())


def forget_hashes(folder):
    """Have a manifest name no files, so that they may be changed."""
    manifest = json.loads((folder / "llmopt.json").read_text())
    (folder / "llmopt.json").write_text(json.dumps(manifest | {"files": {}}))


class TestGenerate:
    def test_an_artifact_and_its_model_tell_stories(self, llmopt, int4):
        for model in (int4, "demo"):
            ended = llmopt("generate", model, "In the morning", "--max-tokens", "20", "--threads", "1", "--json")
            assert ended.code == 0
            assert len(json.loads(ended.out)["text"].split()) > 5

    def test_a_seed_repeats_what_it_said(self, llmopt, int4):
        said = [
            llmopt("generate", int4, "The", "--temperature", "1", "--seed", seed, "--max-tokens", "30").out
            for seed in (1, 1, 2)
        ]
        assert said[0] == said[1] != said[2]

    def test_a_prompt_may_come_from_stdin(self, llmopt, int4, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Once\n"))  # as `echo` ends it
        piped = llmopt("generate", int4, "-", "--max-tokens", "10", "--json")
        typed = llmopt("generate", int4, "Once", "--max-tokens", "10", "--json")
        assert (piped.code, typed.code) == (0, 0)
        assert json.loads(piped.out)["text"] == json.loads(typed.out)["text"]

    def test_a_chat_template_is_used_unless_it_is_declined(self, llmopt, int4, tmp_path):
        folder = shutil.copytree(int4, tmp_path / "chat")
        (folder / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        )

        def said(model, prompt, *options):
            ended = llmopt("generate", model, prompt, "--max-tokens", "12", "--json", *options)
            assert ended.code == 0
            return json.loads(ended.out)["text"]

        template = "system: Be brief\nuser: Once\n"
        # As it is, without what begins a text: the template says all.
        assert said(folder, "Once", "--system", "Be brief") != said(folder, "Once", "--no-chat")
        assert said(folder, "Once", "--no-chat") == said(int4, "Once")
        assert prompt_of(folder, "Once", system="Be brief") == template
        refused = llmopt("generate", int4, "Once", "--system", "Be brief")
        assert refused.code == 2
        assert "--system" in refused.err

    def test_a_prompt_that_is_no_text_is_refused(self, llmopt, int4, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe bad"), encoding="utf-8"))
        for prompt in (os.fsdecode(b"\xff\xfe bad"), "-"):
            ended = llmopt("generate", int4, prompt)
            assert ended.code == 2
            assert "the prompt is not UTF-8 text" in ended.err

    def test_a_model_that_ends_early_or_runs_out_of_room_is_remarked_on(self, llmopt, int4, tmp_path):
        ended = llmopt("generate", int4, "Once upon a time", "--max-tokens", "2000", "--temperature", "0")
        assert "the model reads 1024 tokens: behind this prompt there is room for 10" in ended.err
        folder = shutil.copytree(int4, tmp_path / "silent")
        config = json.loads((folder / "generation_config.json").read_text())
        first = first_token(folder, "Once")
        (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": first}))
        forget_hashes(folder)
        assert "the model ended at once" in llmopt("generate", folder, "Once").err

    def test_an_empty_prompt_and_one_that_is_too_long_are_refused(self, llmopt, int4):
        assert llmopt("generate", int4, "").code == 2
        assert llmopt("generate", int4, "once upon a time " * 2000).code == 2


def test_help_lists_what_there_is():
    ended = subprocess.run([sys.executable, "-m", "llmopt", "--help"], capture_output=True, text=True, check=True)
    commands = [
        "demo",
        "inspect",
        "quantize",
        "cast",
        "probe",
        "partition",
        "launch",
        "bench",
        "run",
        "generate",
        "recipe",
    ]
    listed = ended.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == commands


def test_demo_shows_both_schemes_beside_the_best_that_any_model_could_do(llmopt):
    ended = llmopt("demo", "--threads", "1")
    assert ended.code == 0
    assert "w8a16" in ended.out
    assert "w4a16" in ended.out
    assert "no model can have a perplexity below" in ended.out
