"""The embedded model, and what its stories promise."""

import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from llmopt import demo
from llmopt.model.tokenizer import Tokenizer
from llmopt.train.demo import evaluate


@pytest.fixture(scope="module")
def record():
    return json.loads((demo.folder() / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM.from_pretrained(demo.folder(), dtype=torch.float32)


def test_splits_have_no_story_in_common():
    texts = {split: {story.text for story in demo.documents(split, 500)} for split in demo.Split.__args__}
    assert not texts["train"] & texts["evaluation"]
    assert not texts["train"] & texts["calibration"]
    assert not texts["calibration"] & texts["evaluation"]


def test_more_stories_begin_with_the_same_ones():
    assert demo.documents("evaluation", 5) == demo.documents("evaluation", 8)[:5]
    assert demo.documents("evaluation", 5) != demo.documents("evaluation", 5, seed=1)


def test_the_first_story_is_the_same_everywhere():
    story = demo.documents("evaluation", 1)[0]
    assert story.text.startswith("Behind Hollowell lived Leopold the clever farmer. His")
    assert story.log_probability == pytest.approx(-180.381217996, rel=1e-9)


def test_the_oracle_of_a_fair_coin_is_two():
    stories = [demo.Document("heads tails", 2 * math.log(0.5)), demo.Document("heads", math.log(0.5))]
    assert demo.oracle_perplexity(stories, token_count=3) == pytest.approx(2.0)


def test_the_model_knows_most_of_the_grammar(record):
    assert 3.0 < record["oracle_perplexity"] < record["perplexity"] < 1.3 * record["oracle_perplexity"]


def test_the_record_holds_for_the_weights_that_are_there(model, record):
    stories = demo.documents("evaluation", 60)
    perplexity, tokens = evaluate(model, Tokenizer.from_folder(demo.folder()).backend, stories)
    ratio = perplexity / demo.oracle_perplexity(stories, tokens)
    assert ratio == pytest.approx(record["perplexity"] / record["oracle_perplexity"], rel=0.01)


def test_it_fits_a_wheel(record, model):
    size = sum(file.stat().st_size for file in demo.folder().iterdir())
    assert size < 8 * 2**20
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_stories_need_no_torch():
    code = "import sys, llmopt.demo as d; d.documents('train', 1); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
