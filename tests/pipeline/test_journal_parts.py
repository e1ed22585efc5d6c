"""Parts that come out of a journal are those that went in, and hidden states behind them have the same bits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmopt.artifact import Journal, Manifest, Source
from llmopt.pipeline import journal as parts_journal
from llmopt.pipeline.calibration import Calibration
from llmopt.pipeline.journal import Part, PartJournal, journal_key, part_from_bytes, part_to_bytes
from llmopt.pipeline.parts import PartReader
from llmopt.progress import Silent
from llmopt.quantize.gptq import Gptq
from llmopt.quantize.registry import find_folds
from llmopt.quantize.weights import QuantizedWeight
from tests.decoders import assignments
from tests.families import CASES, Saved, random_weights, spec_of

FAMILIES = ["llama", "gpt2", "gemma3", "opt"]
WINDOWS = [np.random.default_rng(seed).integers(0, 97, length) for seed, length in enumerate((40, 40, 33, 40))]


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


class Model:
    """A family's tiny model, read as often as one likes with one journal."""

    def __init__(self, family: str, scheme: str, folder: Path, method: str = "gptq") -> None:
        self.spec = spec_of(CASES[next(case for case in CASES if case.startswith(family))])
        self.saved: Saved = random_weights(self.spec)
        self.assignments = assignments(self.spec, lambda name: None if "layers.1.mlp" in name else scheme)
        self.journal = Journal(folder)
        self.method = method
        self.heard = Heard()

    def read(self, *, blocks: int | None = None, fitted: bool = True) -> tuple[list[Part], list[torch.Tensor]]:
        """All parts, or those up to some block; and the hidden states behind them."""
        calibration = Calibration(self.spec, WINDOWS)
        pieces = PartJournal(self.journal, self.assignments, WINDOWS, self.heard)
        pieces.announce(self.spec)
        method = Gptq() if fitted else NothingLeft()
        folds = find_folds(self.method)
        reader = PartReader(self.spec, self.saved, self.assignments, method, calibration, folds=folds, journal=pieces)
        found = [reader.embedding()]
        for _, part in zip(range(len(self.spec.blocks) if blocks is None else blocks), reader.blocks(), strict=False):
            found.append(part)
        if blocks is None:
            found.append(reader.head(found[0]))
        return found, calibration.hidden


class NothingLeft(Gptq):
    """Fails when something is to be quantized that should have been in the journal."""

    def quantize(self, *arguments: object) -> QuantizedWeight:
        raise AssertionError("quantized again")


def same(first: Part, second: Part) -> bool:
    return part_to_bytes(first) == part_to_bytes(second)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-sym", "w8a8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_gives_the_same_parts_and_hidden_states_to_the_bit(family: str, scheme: str, tmp_path: Path) -> None:
    model = Model(family, scheme, tmp_path)
    first, hidden = model.read()
    second, replayed = model.read(fitted=False)
    assert [list(part.weights) for part in first] == [list(part.weights) for part in second]
    assert [part.layers for part in first] == [part.layers for part in second]
    for one, other in zip(first, second, strict=True):
        for name, weight in one.weights.items():
            assert_same(weight, other.weights[name])
    assert all(torch.equal(one, other) for one, other in zip(hidden, replayed, strict=True))
    assert model.heard.lines == ["resuming at the head"]


def assert_same(first: torch.Tensor | QuantizedWeight, second: torch.Tensor | QuantizedWeight) -> None:
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor)
        assert torch.equal(first, second)
        return
    assert isinstance(second, QuantizedWeight)
    assert first.scheme == second.scheme
    for one, other in ((first.codes_OI, second.codes_OI), (first.scales_OG, second.scales_OG)):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert (first.zero_points_OG is None) == (second.zero_points_OG is None)
    if first.zero_points_OG is not None and second.zero_points_OG is not None:
        assert torch.equal(first.zero_points_OG, second.zero_points_OG)


@pytest.mark.parametrize("method", ["gptq", "smoothquant+gptq"])
def test_blocks_behind_a_stop_are_those_of_an_undisturbed_run(method: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    expected, _ = Model("llama", "w4a16", tmp_path / "whole", method).read()
    model = Model("llama", "w4a16", tmp_path / "stopped", method)
    model.read(blocks=1)
    found, _ = model.read()
    assert model.heard.lines == [f"resuming at block 2 of {len(model.spec.blocks)}"]
    assert all(map(same, expected, found))


def test_a_damaged_part_is_made_again_and_that_is_said(tmp_path: Path) -> None:
    model = Model("llama", "w4a16", tmp_path)
    expected, _ = model.read()
    file = next(tmp_path.glob("*block-0.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found, _ = model.read()
    assert all(map(same, expected, found))
    assert "the journal of block-0 is damaged: it is done again" in model.heard.lines
    assert file.read_bytes() != bytes(data)


def test_other_schemes_other_text_and_other_bases_do_not_take_each_others_parts(tmp_path: Path) -> None:
    model = Model("llama", "w4a16", tmp_path)
    model.read()
    model.assignments = assignments(model.spec, lambda name: "w8a16")
    with pytest.raises(AssertionError, match="quantized again"):
        model.read(fitted=False)
    choices = {
        PartJournal(model.journal, model.assignments, windows, model.heard).choice
        for windows in (WINDOWS, WINDOWS[:2], [WINDOWS[0], *WINDOWS[2:]])
    }
    turned = {PartJournal(model.journal, model.assignments, WINDOWS, model.heard, turn).choice for turn in (0, 1)}
    assert len(choices | turned) == 5


def test_a_journal_is_of_one_manifest_one_number_of_threads_and_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest(source=Source(name="demo", fingerprint="f" * 64), format="onnx")
    keys = [journal_key(manifest, 1), journal_key(manifest, 2), journal_key(replace(manifest, seed=1), 1)]
    assert journal_key(manifest, 1) == keys[0]
    monkeypatch.setattr(parts_journal, "describe_host", lambda threads: {"cpu": "another", "isa": []})
    assert len({*keys, journal_key(manifest, 1)}) == 4


def test_a_part_comes_back_from_bytes() -> None:
    part = Part({"norm.weight": torch.arange(3.0)}, [])
    assert torch.equal(part_from_bytes(part_to_bytes(part)).weights["norm.weight"], torch.arange(3.0))  # type: ignore[arg-type]
