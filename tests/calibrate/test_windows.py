"""Documents end to end, cut into windows, each token with what it belongs to."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from llmopt.calibrate.text import Corpus
from llmopt.calibrate.windows import windows
from llmopt.errors import UsageError


@dataclass
class Letters:
    """A token a letter, counted from `a`."""

    bos_id: int | None = None
    seen: list[str] = field(default_factory=list)

    def encode(self, text):
        self.seen.append(text)
        return [ord(letter) - ord("a") for letter in text]


THREE = Corpus("three", ("abc", "defg", "hij"))


def listed(arrays):
    return [array.tolist() for array in arrays]


def test_windows_run_over_the_ends_of_documents():
    cut = windows(THREE, Letters(), window=4)
    assert listed(cut.ids) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert listed(cut.cluster) == [[0, 0, 0, 1], [1, 1, 1, 2], [2, 2]]
    assert (cut.name, cut.clustered_by, cut.tokens) == ("three", "document", 10)
    assert {array.dtype for array in (*cut.ids, *cut.cluster)} == {np.dtype(np.int64)}


def test_a_last_window_of_one_token_is_left_out():
    assert listed(windows(THREE, Letters(), window=3).ids) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_each_window_begins_with_the_token_that_the_tokenizer_prepends():
    cut = windows(THREE, Letters(bos_id=99), window=4)
    assert listed(cut.ids) == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8], [99, 9]]
    assert listed(cut.cluster) == [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 2, 2], [2, 2]]


def test_a_single_document_is_clustered_by_window():
    cut = windows(Corpus("one", ("abcdefg",)), Letters(), window=3)
    assert listed(cut.cluster) == [[0, 0, 0], [1, 1, 1]]
    assert cut.clustered_by == "window"


def test_the_limit_counts_tokens_of_text_and_spares_the_rest_of_it():
    tokenizer = Letters()
    cut = windows(THREE, tokenizer, window=4, limit_tokens=6)
    assert listed(cut.ids) == [[0, 1, 2, 3], [4, 5]]
    assert tokenizer.seen == ["abc", "defg"]


def test_spread_windows_lie_at_even_distances_all_through_the_text():
    documents = tuple(chr(ord("a") + number) * 4 for number in range(10))
    cut = windows(Corpus("ten", documents), Letters(), window=4, limit_tokens=14, spread=True)
    assert listed(cut.ids) == [[0] * 4, [2] * 4, [5] * 4, [7] * 2]
    assert listed(cut.cluster) == listed(cut.ids)


@pytest.mark.parametrize("bos_id", [None, 0])
@pytest.mark.parametrize("limit", range(2, 14))
def test_spread_windows_hold_what_was_asked_for_and_never_the_same_text_twice(bos_id, limit):
    corpus = Corpus("letters", ("bcdefg", "hijkl", "m"))
    cut = windows(corpus, Letters(bos_id=bos_id), window=4, limit_tokens=limit, spread=True)
    text = [token for ids in cut.ids for token in ids.tolist() if token]
    assert text == sorted(set(text))
    assert min(limit, 12) - 1 <= len(text) <= limit
    assert all(2 <= len(ids) <= 4 for ids in cut.ids)


def test_text_that_is_no_longer_than_the_limit_is_read_whole():
    cut = windows(THREE, Letters(), window=4, limit_tokens=10, spread=True)
    assert listed(cut.ids) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_hash_is_that_of_tokens_and_windows():
    digests = [
        windows(THREE, Letters(), window=4).sha256,
        windows(Corpus("other name", ("abcdefghij",)), Letters(), window=4).sha256,
        windows(THREE, Letters(), window=5).sha256,
        windows(Corpus("three", ("abc", "defg", "hik")), Letters(), window=4).sha256,
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_text_of_one_token_cannot_be_predicted():
    with pytest.raises(UsageError, match="fewer than 2 tokens") as caught:
        windows(Corpus("short", ("a",)), Letters(), window=8)
    assert caught.value.where == "short"


@pytest.mark.parametrize(("window", "limit"), [(1, None), (0, None), (8, 1), (8, -3)])
def test_windows_and_limits_below_two_are_refused(window, limit):
    with pytest.raises(UsageError, match="windows of"):
        windows(THREE, Letters(), window=window, limit_tokens=limit)
