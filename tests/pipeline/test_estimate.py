"""What a run will need is told before it begins, lies near what it takes, and ends it at once where it is not there."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from llmopt.artifact import Journal, journal_folder
from llmopt.errors import ResourceError
from llmopt.model.source import open_source
from llmopt.pipeline import estimate as module
from llmopt.pipeline.estimate import Estimate, Work
from llmopt.pipeline.formats.registry import FORMATS
from llmopt.pipeline.parts import CHUNK_WEIGHTS
from llmopt.pipeline.qat.options import QatOptions
from llmopt.quantize.assign import assign
from llmopt.quantize.scheme import parse_scheme
from tests.whole_way import CommandLine

MIB = 2**20
LEARNT = ("--scheme", "w4a16", "--method", "reconstruct", "--calib-tokens", "2048", "--threads", "1")
CALIBRATED = ("--scheme", "w4a16", "--method", "search", "--calib-tokens", "4096", "--threads", "1")


@pytest.fixture
def llmopt(capfd):
    return CommandLine(capfd)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def spec(tiny_llama):
    return open_source(str(tiny_llama)).spec


def estimated(spec, *, tokens=None, folds=False, format_="onnx", limit=sys.maxsize, **more):
    found = FORMATS[format_]
    assignments = assign(spec, parse_scheme("w4a16"), (), (), found.tables)
    work = Work(spec=spec, assignments=assignments, format=found, tokens=tokens, folds=folds, limit_bytes=limit, **more)
    return work.estimate(output_bytes=0)


@pytest.mark.parametrize("options", [("--scheme", "w8a8", "--threads", "1"), CALIBRATED, LEARNT])
def test_a_run_peaks_near_what_it_said(options, out):
    """In a process of its own, which has the memory that a command has."""
    program = [sys.executable, "-m", "llmopt", "quantize", "demo", "-o", str(out), "--json", *options]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    memory = json.loads(done.stdout)["memory"]
    assert 3 / 4 <= memory["peak_bytes"] / memory["predicted_bytes"] <= 4 / 3
    assert f"out needs about {memory['predicted_bytes'] / 1e6:,.0f} MB of memory" in done.stderr


def with_blocks(spec, count):
    return replace(spec, blocks=tuple(replace(spec.blocks[0], index=index) for index in range(count)))


@pytest.mark.parametrize("tokens", [None, 2**20])
def test_blocks_take_the_memory_of_one(spec, tokens):
    few, many = (estimated(with_blocks(spec, count), tokens=tokens) for count in (30, 120))
    assert few.steps["a block"] == many.steps["a block"]
    assert many.more_bytes - few.more_bytes < 90 * MIB
    assert (many.journal_bytes > 3 * few.journal_bytes) == (tokens is not None)


def test_more_tokens_take_more(spec):
    few, many = (estimated(spec, tokens=tokens) for tokens in (2**20, 2**21))
    states = 4 * 2**20 * spec.hidden_size
    assert 2 * states <= many.steps["a block"] - few.steps["a block"] <= 6 * states


def test_what_spills_is_on_the_disk_and_not_in_memory(spec):
    whole, spilled = estimated(spec, tokens=2**21), estimated(spec, tokens=2**21, limit=2**20)
    states = 4 * 2**21 * spec.hidden_size
    assert whole.spilled_bytes == 0
    assert spilled.spilled_bytes == spilled.disk_bytes - spilled.journal_bytes == 2 * (states - 2**20)
    assert whole.steps["a block"] - spilled.steps["a block"] == 3 * (states - 2**20)
    assert "1,072 MB of activations" in str(spilled)


def test_what_folds_leave_is_kept_beside_what_is_quantized(spec):
    plain, folded = (estimated(spec, tokens=4096, folds=folds) for folds in (False, True))
    block = 4 * sum(tensor.count for tensor in spec.blocks[0].tensors())
    assert folded.steps["a block"] - plain.steps["a block"] == block


def test_methods_that_are_tried_beside_each_other_leave_codes_and_need_what_judges_them(spec):
    one, three = (estimated(spec, tokens=4096, candidates=count).steps["a block"] for count in (1, 3))
    mlp = spec.blocks[0].mlp
    groups = [
        (linears[0].in_features, sum(one.weight.count for one in linears)) for linears in (mlp.inputs, [mlp.down])
    ]
    assert three - one in [8 * width**2 + 4 * count for width, count in groups]


def test_a_large_vocabulary_is_a_large_table(spec):
    large = replace(spec, embedding=replace(spec.embedding, vocab_size=2**20))
    (table,) = large.embedding.tensors()
    found = estimated(large)
    assert found.steps["the token table"] >= 12 * table.count
    assert found.held_bytes - estimated(spec).held_bytes >= table.count


@pytest.mark.parametrize(("tokens", "whole"), [(None, False), (4096, True)])
def test_a_large_head_is_fitted_as_a_whole_and_rounded_some_rows_at_a_time(spec, tokens, whole):
    large = replace(spec, head=replace(spec.head, tied_to=None, out_features=2**20))
    head = estimated(large, tokens=tokens).steps["the head"]
    assert (head >= 40 * large.head.weight.count) == whole
    assert head >= 40 * CHUNK_WEIGHTS


def test_transformers_opens_the_whole_model(spec):
    weights = sum(tensor.count for tensor in spec.tensors())
    assert estimated(spec, format_="hf").steps["verification"] > 4 * weights


def test_the_journal_is_as_large_as_was_said(llmopt, tiny_llama, out, monkeypatch):
    written = []
    write = Journal.write

    def recorded(self, name, data):
        written.append(len(data))
        write(self, name, data)

    monkeypatch.setattr(Journal, "write", recorded)
    planned = json.loads(llmopt("quantize", tiny_llama, "-o", out, *CALIBRATED, "--dry-run", "--json").out)["estimate"]
    assert llmopt("quantize", tiny_llama, "-o", out, *CALIBRATED).code == 0
    headers = 8_000 * len(written)
    assert planned["journal_bytes"] <= sum(written) <= planned["journal_bytes"] + headers
    assert planned["disk_bytes"] == planned["journal_bytes"] + planned["output_bytes"]
    written_bytes = sum(path.stat().st_size for path in out.glob("model.onnx*"))
    assert written_bytes <= planned["output_bytes"] <= 1.3 * written_bytes


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_too_little_memory_ends_it_before_it_begins(llmopt, tiny_llama, out, monkeypatch, dry):
    monkeypatch.setattr(module, "available_bytes", lambda: 7_000_000)
    ended = llmopt("quantize", tiny_llama, "-o", out, *CALIBRATED, *dry)
    assert ended.code == 3
    assert "the memory has no room" in ended.err
    assert "7 MB available" in ended.err
    assert "--calib-tokens" in ended.err
    assert not list(out.parent.iterdir())


def test_the_estimate_is_part_of_a_plan_and_explained(llmopt, tiny_llama, out, monkeypatch):
    monkeypatch.setattr(module, "resident_bytes", lambda: 300_000_000)
    told = llmopt("quantize", tiny_llama, "-o", out, "--dry-run", "--explain").out
    planned = json.loads(llmopt("quantize", tiny_llama, "-o", out, "--dry-run", "--json").out)["estimate"]
    assert f"needs about {planned['memory_bytes'] / 1e6:,.0f} MB of memory" in told
    by_step = planned["memory_bytes_by_step"]
    assert max(by_step.values()) == planned["memory_bytes"]
    assert all(step in told for step in by_step)


def test_what_was_explained_stands_beside_what_it_took(llmopt, tiny_llama, out):
    told = llmopt("quantize", tiny_llama, "-o", out, "--explain", "--threads", "1").out
    assert "predicted resident memory: the token table" in told
    assert "resident at the peak:" in told


def test_what_the_journal_has_need_not_be_free_any_more(out, monkeypatch):
    needed = Estimate(resident_bytes=0, held_bytes=0, steps={"a block": 0}, output_bytes=600, journal_bytes=400)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2_000, 1_100, 900))
    with pytest.raises(ResourceError, match="the disk has no room"):
        needed.require_room(out)
    journal_folder(out).mkdir()
    (journal_folder(out) / "part").write_bytes(bytes(100))
    needed.require_room(out)


@pytest.mark.parametrize("options", [QatOptions(), QatOptions(batch=1)])
def test_of_what_learns_each_process_has_a_share(spec, options):
    deep = with_blocks(spec, 120)
    whole, halves, quarters = (
        estimated(deep, training=options, sharing=count).steps["training"] for count in (1, 2, 4)
    )
    weights = 120 * sum(tensor.count for tensor in spec.blocks[0].tensors())
    assert whole > halves > quarters
    assert halves - quarters == pytest.approx(5 * 4 * weights / 4, rel=0.01)
