"""What every test can rely on: an environment of its own, no network, one thread, and a tiny model."""

import os
import signal
import tempfile

import pytest

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "COLUMNS": "200",
    "LLMOPT_DEBUG": "0",
}
_NOT_INHERITED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "FORCE_COLOR", "TTY_COMPATIBLE")


def pytest_addoption(parser):
    parser.addoption(
        "--real", action="store_true", help="run the tests that need the real reference model, and no others"
    )


def pytest_configure(config):
    # A job in the background ignores Ctrl-C, and so would every program that a test starts in order to interrupt it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Before any test file is read: huggingface_hub and torch look at the environment once, when they are imported.
    home = tempfile.TemporaryDirectory(prefix="llmopt-tests-")
    config.add_cleanup(home.cleanup)
    os.environ.update(_ENVIRONMENT, HF_HOME=home.name, LLMOPT_CACHE=f"{home.name}/llmopt")
    for name in _NOT_INHERITED:
        os.environ.pop(name, None)


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--real")
    dropped = [item for item in items if ("real" in item.keywords) != wanted]
    items[:] = [item for item in items if ("real" in item.keywords) == wanted]
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name, value in _ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True, scope="session")
def _all_kernels_are_equally_fast():
    """No test depends on what else the machine is doing; a test of choices says itself what is fast."""
    from llmopt.measure import interleaved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interleaved, "fastest_ms", lambda calls, budget_s: [1.0] * len(calls))
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder with a Llama of two blocks (hidden 64, vocabulary 128) and random weights. Copy it to change it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = _letters_tokenizer()
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,  # so that logits differ enough to rank
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _letters_tokenizer():
    """One token a printable ASCII character."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    letters = ["\n", *map(chr, range(ord(" "), ord("~") + 1))]
    vocabulary = {token: number for number, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
