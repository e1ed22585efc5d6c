"""The tiny model that other tests stand on."""

import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "The quick brown fox,\n~ jumps {over} 12 lazy dogs."


def test_the_tiny_model_opens_and_its_tokenizer_gives_the_text_back(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert ids.shape == (1, len(TEXT))
    assert tokenizer.decode(ids[0]) == TEXT
    logits = model(ids).logits
    assert logits.shape == (1, len(TEXT), 128)
    assert logits.std() > 0.1
    assert torch.get_num_threads() == 1


def test_tests_see_neither_the_network_nor_the_home_of_the_person_who_runs_them():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "llmopt-tests-" in os.environ["HF_HOME"]
    assert "HF_TOKEN" not in os.environ
