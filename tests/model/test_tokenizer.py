"""Tokenizers from folders: ids, text, streams of text, and conversations."""

import json
from datetime import datetime

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from llmopt import demo
from llmopt.errors import ModelError
from llmopt.model.tokenizer import Tokenizer

TEXT = "Near Harrow, a wörld: 日本 🙂👩‍👧 \n\n <s> end "
CHATML = """
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + eos_token + '\\n' }}
{%- endfor %}
{% generation %}{{ messages | tojson }}{% endgeneration %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""
HELLO = [{"role": "system", "content": "Be <brief> & kind. "}, {"role": "user", "content": "Hé!"}]


def byte_level():
    """A token a byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def sentence_pieces():
    """As converted from SentencePiece: words behind a mark that stands for a space, other characters as bytes."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehlorw", "▁w", "▁h"]
    vocabulary = {token: number for number, token in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[("▁", "w"), ("▁", "h")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def saved(folder, backend=None, **config):
    (backend or byte_level()).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)


def with_bos(backend):
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return backend


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_ids_and_text_are_those_of_transformers(tmp_path, make):
    tokenizer = saved(tmp_path, make())
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(TEXT)
    assert ids == reference.encode(TEXT, add_special_tokens=False)
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert "<s>" not in tokenizer.decode(ids)


def test_the_demo_models_tokenizer_adds_nothing_and_loses_nothing():
    tokenizer = Tokenizer.from_folder(demo.folder())
    story = demo.documents("calibration", 1)[0].text
    assert tokenizer.decode(tokenizer.encode(story)) == story
    assert tokenizer.bos_id is None
    assert not tokenizer.has_chat_template


def test_bos_is_what_the_tokenizer_itself_puts_before_a_text(tmp_path):
    assert saved(tmp_path, with_bos(byte_level())).bos_id == 0
    assert Tokenizer.from_folder(tmp_path).encode("a") == byte_level().encode("a").ids


def test_a_bos_that_is_only_in_the_vocabulary_is_not_prepended(tmp_path):
    assert saved(tmp_path).bos_id is None


def test_a_token_behind_the_text_is_no_bos(tmp_path):
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    assert saved(tmp_path, backend).bos_id is None


def test_truncation_and_padding_of_a_training_run_do_not_apply(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    assert len(saved(tmp_path, backend).encode("seven letters")) == 13


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_a_stream_gives_the_text_of_all_its_tokens(tmp_path, make):
    tokenizer = saved(tmp_path, make())
    for text in (TEXT, "hello world", " 日本\n"):
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        assert "".join(stream.push(token) for token in ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_a_stream_holds_a_character_back_until_it_is_whole(tmp_path, make):
    tokenizer = saved(tmp_path, make())
    stream = tokenizer.stream(tokenizer.encode("ha"))
    assert [stream.push(token) for token in tokenizer.encode("a🙂")[-4:]] == ["", "", "", "🙂"]


def test_a_stream_keeps_the_space_between_a_prompt_and_what_follows(tmp_path):
    tokenizer = saved(tmp_path, sentence_pieces())
    prompt, rest = tokenizer.encode("hello"), tokenizer.encode("world hello")
    assert tokenizer.decode(rest) == "world hello"
    stream = tokenizer.stream(prompt)
    assert "".join(stream.push(token) for token in rest) == " world hello"


def test_a_stream_gives_nothing_for_special_tokens_and_goes_on_behind_them(tmp_path):
    tokenizer = saved(tmp_path)
    stream = tokenizer.stream()
    assert [stream.push(token) for token in tokenizer.encode("a<s>b")] == ["a", "", "b"]


@pytest.mark.parametrize("place", ["jinja", "config", "config list"])
def test_conversations_read_as_in_transformers(tmp_path, place):
    entries = {"config": CHATML, "config list": [{"name": "default", "template": CHATML}]}
    if place == "jinja":
        (tmp_path / "chat_template.jinja").write_text(CHATML)
        saved(tmp_path, chat_template="the file wins")
    else:
        saved(tmp_path, chat_template=entries[place])
    tokenizer, reference = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for prompt in (True, False):
        expected = reference.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.chat(HELLO, add_generation_prompt=prompt) == expected
    assert "<|system|>\nBe <brief> & kind.</s>\n" in expected


def test_templates_know_the_date(tmp_path):
    tokenizer = saved(tmp_path, chat_template="{{ strftime_now('%Y') }}")
    assert tokenizer.chat(HELLO) in {str(datetime.now().year + late) for late in (-1, 0)}


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% set _ = messages.append(1) %}", "unsafe|not callable|not safely"),
        ("{{ messages[9].role }}", "no element 9"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_a_template_that_fails_is_the_models_fault(tmp_path, template, what):
    tokenizer = saved(tmp_path, chat_template=template)
    with pytest.raises(ModelError, match=what) as caught:
        tokenizer.chat(HELLO)
    assert caught.value.where == str(tmp_path)


def test_a_model_without_template_cannot_chat(tmp_path):
    tokenizer = saved(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(ModelError, match="no chat template"):
        tokenizer.chat(HELLO)


def test_special_tokens_may_be_objects_and_lie_in_a_file_of_their_own(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}, "bos_token": "older"}')
    tokenizer = saved(tmp_path, eos_token={"content": "</s>", "lstrip": False}, unk_token=None)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def test_an_older_format_is_converted(tmp_path):
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", "a", "b", "ab", "Ġ"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("ab ba") == [3, 4, 2, 1]
    assert tokenizer.decode([3, 4, 2, 1]) == "ab ba"


def test_a_folder_without_tokenizer_says_what_to_put_there(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer") as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.where == str(tmp_path)
    assert "tokenizer.json" in caught.value.hint


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_broken_file_is_named(tmp_path, name):
    saved(tmp_path)
    (tmp_path / name).write_text('{"version": ')
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.where == str(tmp_path / name)


def test_an_older_format_that_cannot_be_converted_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x00not a model")
    with pytest.raises(ModelError, match="cannot be converted") as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.where == str(tmp_path)
