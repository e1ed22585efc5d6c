"""A dataset's name stands for text wherever a file does, and an artifact remembers which text it was."""

import json
from pathlib import Path

import pytest

from llmopt.errors import UsageError
from llmopt.pipeline.bench import BenchRequest, BenchSettings, bench
from llmopt.pipeline.prepare import prepare
from llmopt.pipeline.request import QuantizeRequest
from llmopt.progress import Silent
from llmopt.quantize.scheme import parse_scheme


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "stories"
    folder.mkdir()
    for number, split in enumerate(("train", "test")):
        text = " ".join(f"{split} {count * count + number}" for count in range(80))
        (folder / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return folder


def test_the_manifest_says_which_part_of_a_dataset_was_read(dataset: Path, tiny_llama: Path, tmp_path: Path) -> None:
    def entry(calib: str) -> object:
        request = QuantizeRequest(
            model=str(tiny_llama), output=tmp_path / "out", scheme=parse_scheme("w4a16"), method="gptq", calib=calib
        )
        return prepare(request, Silent()).manifest().calibration

    train, test = entry(str(dataset)), entry(f"{dataset}::test")
    assert isinstance(train, dict)
    assert isinstance(test, dict)
    assert train["text"] == "stories:default:train:text"
    assert test["text"] == "stories:default:test:text"
    assert train["sha256"] != test["sha256"]


def test_bench_misses_a_split_before_it_makes_a_baseline(
    dataset: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmopt.pipeline.bench.float_artifact", lambda *_, **__: pytest.fail("a baseline was made"))
    request = BenchRequest(
        candidates=(str(tiny_llama),),
        baseline=str(tiny_llama),
        settings=BenchSettings(text=f"{dataset}::tset", window=64),
    )
    with pytest.raises(UsageError, match="no split 'tset'") as caught:
        bench(request, Silent())
    assert caught.value.hint == "did you mean 'test'? known here: test, train"
