"""Where documents begin and end, and what is no text."""

import json

import pytest

from llmopt.calibrate.text import Corpus, built_in, load_documents, split
from llmopt.errors import UsageError

WIKITEXT = (
    " \n = Crab = \n \n A crab walks . \n \n = = Habitat = = \n \n The sea . \n \n = 1 + 1 = 2 = \n \n A sum . \n"
)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_wikitext_is_cut_before_titles_and_not_before_sections(tmp_path):
    corpus = load_documents(write(tmp_path, "wiki.txt", WIKITEXT))
    assert corpus.name == "wiki.txt"
    assert [document.split("\n")[1 if index == 0 else 0] for index, document in enumerate(corpus.documents)] == [
        " = Crab = ",
        " = 1 + 1 = 2 = ",
    ]
    assert "".join(corpus.documents) == WIKITEXT


def test_what_stands_before_the_first_title_is_a_document(tmp_path):
    documents = load_documents(write(tmp_path, "wiki.txt", "A preface .\n" + WIKITEXT)).documents
    assert documents[0] == "A preface .\n \n"
    assert len(documents) == 3


def test_one_title_alone_does_not_cut(tmp_path):
    text = "Once .\n = Crab = \n A crab .\n---\nMore .\n"
    assert load_documents(write(tmp_path, "a.txt", text)).documents == ("Once .\n = Crab = \n A crab .\n", "More .\n")


@pytest.mark.parametrize("separator", ["---", "\f", "---  "])
def test_separators_cut_and_belong_to_no_document(tmp_path, separator):
    text = f"{separator}\nfirst\n\nstill first -- ---\n{separator}\n{separator}\nsecond\n{separator}"
    documents = load_documents(write(tmp_path, "a.txt", text)).documents
    assert documents == ("first\n\nstill first -- ---\n", "second\n")


def test_other_text_is_one_document(tmp_path):
    text = "first\n\nsecond\n----\n"
    assert load_documents(write(tmp_path, "a.txt", text)).documents == (text,)


def test_windows_line_ends_and_byte_order_marks_are_no_text(tmp_path):
    assert load_documents(write(tmp_path, "a.txt", b"\xef\xbb\xbfa\r\n---\r\nb")).documents == ("a\n", "b")


def test_json_lines_hold_a_document_each(tmp_path):
    texts = ["two\nlines", "a\u2028b \u00e9", "  "]
    lines = [json.dumps({"text": text, "n": 1}, ensure_ascii=False) for text in texts]
    path = write(tmp_path, "a.jsonl", "\n\n".join(lines) + "\n")
    assert load_documents(path).documents == ("two\nlines", "a\u2028b \u00e9")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": "b"', "not valid JSON"),
        ('{"txt": "b"}', "under the key 'text'"),
        ('{"text": 3}', "under the key 'text'"),
        ('["text"]', "under the key 'text'"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path, line, what):
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(UsageError, match=what) as caught:
        load_documents(path)
    assert caught.value.where == f"{path}:3"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", "", "no text"),
        ("a.txt", " \n---\n\n", "no text"),
        ("a.jsonl", '{"text": ""}\n', "no text"),
        ("a.pdf", "text", "unknown format"),
        ("a.txt", b"\x00\xff", "zero bytes"),
    ],
)
def test_a_file_without_text_is_refused_with_a_way_out(tmp_path, name, content, what):
    path = write(tmp_path, name, content)
    with pytest.raises(UsageError, match=what) as caught:
        load_documents(path)
    assert caught.value.where == str(path)
    assert ".jsonl" in caught.value.hint


def test_text_that_is_not_utf8_is_refused_at_its_line(tmp_path):
    path = write(tmp_path, "a.txt", b"fine\nna\xefve\n")
    with pytest.raises(UsageError, match="not UTF-8") as caught:
        load_documents(path)
    assert caught.value.where == f"{path}:2"


def test_a_missing_file_is_a_wrong_command_line(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file") as caught:
        load_documents(tmp_path / "none.txt")
    assert "check the path" in caught.value.hint


def test_the_built_in_text_to_evaluate_on_is_not_the_one_to_calibrate_on():
    evaluation, calibration = built_in(count=50), built_in("calibration", count=50)
    assert evaluation.name == "built-in demo text"
    assert len(evaluation.documents) == 50
    assert not set(evaluation.documents) & set(calibration.documents)


def test_a_corpus_is_split_where_a_document_ends():
    corpus = Corpus("numbers", ("a" * 10, "b" * 30, "c" * 10, "d" * 50))
    for fraction, count in [(0.01, 1), (0.24, 1), (0.26, 2), (0.44, 2), (0.46, 3), (0.99, 3)]:
        calibration, evaluation = split(corpus, fraction)
        assert calibration.documents == corpus.documents[:count]
        assert evaluation.documents == corpus.documents[count:]
    assert calibration.name == "numbers, calibration part"


def test_a_single_document_is_split_where_a_line_ends_or_else_a_word():
    calibration, evaluation = split(Corpus("a", ("one two\nthree four\nfive six\n",)), 0.8)
    assert (*calibration.documents, *evaluation.documents) == ("one two\nthree four\n", "five six\n")
    calibration, evaluation = split(Corpus("a", ("one two three four",)), 0.5)
    assert (*calibration.documents, *evaluation.documents) == ("one two ", "three four")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_leaves_one_part_empty_is_refused(fraction):
    with pytest.raises(UsageError, match="calibration fraction"):
        split(Corpus("a", ("one", "two")), fraction)


def test_a_word_cannot_be_split():
    with pytest.raises(UsageError, match="too little text"):
        split(Corpus("a", ("word",)), 0.5)
