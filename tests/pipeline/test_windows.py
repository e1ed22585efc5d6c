"""Tokens to verify an export on: text that the model can read, the same every time."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llmopt.model.source import open_source
from llmopt.model.spec import ModelSpec
from llmopt.model.tokenizer import Tokenizer
from llmopt.pipeline.windows import COUNT, LENGTH, verification_windows


@pytest.fixture
def spec(tiny_llama: Path) -> ModelSpec:
    return open_source(str(tiny_llama)).spec


def test_windows_are_text_in_the_tokens_of_the_model(tiny_llama: Path, spec: ModelSpec) -> None:
    found = verification_windows(spec, tiny_llama, seed=0)
    assert [len(ids) for ids in found] == [LENGTH] * COUNT
    text = Tokenizer.from_folder(tiny_llama).decode(found[0].tolist())
    assert len(set(text.split())) > 5


def test_they_depend_on_the_seed_alone(tiny_llama: Path, spec: ModelSpec) -> None:
    first, again, other = (verification_windows(spec, tiny_llama, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(np.stack(first), np.stack(again))
    assert not np.array_equal(np.stack(first), np.stack(other))


def test_they_are_no_longer_than_the_model_reads(tiny_llama: Path, spec: ModelSpec) -> None:
    short = dataclasses.replace(spec, context_length=24)
    assert [len(ids) for ids in verification_windows(short, tiny_llama, seed=0)] == [24] * COUNT


def test_no_token_is_beyond_the_rows_of_the_table(tiny_llama: Path, spec: ModelSpec) -> None:
    """A tokenizer may know more tokens than the model."""
    small = dataclasses.replace(spec, embedding=dataclasses.replace(spec.embedding, vocab_size=50))
    found = np.stack(verification_windows(small, tiny_llama, seed=0))
    assert found.max() == 49
    assert (found < 49).any()
