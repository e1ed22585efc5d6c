"""Training, in so few steps that only its machinery shows."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from llmopt import demo
from llmopt.demo.tokenizer import learn
from llmopt.train.demo import Settings, evaluate, new_model, train
from llmopt.train.settings import Precision

QUICK = Settings(
    steps=8, tokens_per_step=512, window=128, long_share=0.0, warmup_steps=2, tokenizer_documents=200,
    evaluation_documents=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(QUICK, folder)


def test_the_same_seed_gives_the_same_bytes(trained, tmp_path):
    train(QUICK, tmp_path)
    names = {file.name for file in tmp_path.iterdir()} - {"training.json"}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in names:
        assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes(), name


def test_a_few_steps_learn_something(trained):
    assert trained[1]["perplexity"] < 0.7 * 1536


def test_what_is_returned_is_written_beside_the_weights(trained):
    folder, record = trained
    assert json.loads((folder / "training.json").read_text(encoding="utf-8")) == record
    assert record["tokens"] == 8 * 512


def test_evaluation_sums_the_losses_of_each_story_behind_a_line_feed(trained):
    stories = demo.documents("evaluation", 5)
    tokenizer = learn(story.text for story in demo.documents("train", 200))
    model = LlamaForCausalLM.from_pretrained(trained[0], dtype=torch.float32)
    nats, tokens = 0.0, 0
    for story in stories:
        ids = torch.tensor([tokenizer.encode("\n" + story.text).ids])
        with torch.inference_mode():
            loss = model(input_ids=ids, labels=ids).loss.item()
        nats, tokens = nats + loss * (ids.shape[1] - 1), tokens + ids.shape[1] - 1
    perplexity, counted = evaluate(model, tokenizer, stories, batch=2)
    assert counted == tokens == sum(len(tokenizer.encode(story.text).ids) for story in stories)
    assert perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_the_last_steps_see_the_whole_context():
    settings = Settings(steps=100, long_share=0.12)
    assert [settings.window_at(step) for step in (0, 87, 88, 99)] == [256, 256, 1024, 1024]


def test_every_group_size_divides_the_model():
    model = new_model(learn(story.text for story in demo.documents("train", 50)))
    sizes = {size for parameter in model.parameters() if parameter.ndim == 2 for size in parameter.shape[1:]}
    assert all(size % 128 == 0 for size in sizes)


@pytest.mark.slow
def test_fp16_comes_to_the_loss_of_fp32_within_a_hundredth(tmp_path):
    small = replace(QUICK, tokens_per_step=128, window=64)
    full, half = (train(replace(small, precision=one), tmp_path / one) for one in (Precision.FP32, Precision.FP16))
    assert full["perplexity"] < 0.9 * 1536
    assert math.log(half["perplexity"]) == pytest.approx(math.log(full["perplexity"]), rel=0.01)
