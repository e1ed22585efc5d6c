"""Text as windows of tokens, which is how engines read it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from llmopt.calibrate.text import Corpus
from llmopt.errors import UsageError

Ids = NDArray[np.int64]


class Encoder(Protocol):
    """What is asked of a tokenizer."""

    @property
    def bos_id(self) -> int | None:
        """The token that the model expects before every text, if it expects one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; none is added before or behind it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWindows:
    """One array [T] of token ids for each window, T at least 2; the first token of each is context, not predicted.

    `cluster`, of the same shapes, numbers what each token belongs to: its document, or, where the whole text is one
    document, its window. `sha256` is that of the ids and of where windows begin.
    """

    name: str
    ids: tuple[Ids, ...]
    cluster: tuple[Ids, ...]
    clustered_by: Literal["document", "window"]
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(map(len, self.ids))


def windows(
    corpus: Corpus, tokenizer: Encoder, window: int, limit_tokens: int | None = None, *, spread: bool = False
) -> TokenWindows:
    """Documents, tokenized one by one, end to end, cut into windows of `window` tokens; the last may be shorter.

    Where the tokenizer has a `bos_id`, each window begins with it, and has one token of text less. `limit_tokens`
    bounds the tokens of text: the first of it are read, or, with `spread`, windows at even distances all through it.
    That takes longer, for all of it is tokenized, and it sees more documents.

    Raises:
        UsageError: the window or the limit is below 2, or the text has fewer than 2 tokens.
    """
    if window < 2 or (limit_tokens is not None and limit_tokens < 2):
        raise UsageError(f"windows of {window} tokens, at most {limit_tokens} in all", hint="both are at least 2")
    ids_N, document_N = _stream(corpus, tokenizer, None if spread else limit_tokens)
    if len(ids_N) < 2:
        raise UsageError("the text has fewer than 2 tokens", where=corpus.name, hint="give more text")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    pieces = list(_pieces(len(ids_N), window, len(bos)))
    if limit_tokens is not None and len(ids_N) > limit_tokens:
        pieces = list(_spread(pieces, limit_tokens, window - len(bos), len(bos)))
    ids = tuple(np.concatenate([np.asarray(bos, dtype=np.int64), ids_N[piece]]) for piece in pieces)
    by_document = len(corpus.documents) > 1
    document = tuple(np.concatenate([document_N[piece][: len(bos)], document_N[piece]]) for piece in pieces)
    window_number = tuple(np.full(len(ids_T), number, dtype=np.int64) for number, ids_T in enumerate(ids))
    return TokenWindows(
        name=corpus.name,
        ids=ids,
        cluster=document if by_document else window_number,
        clustered_by="document" if by_document else "window",
        sha256=_digest(ids),
    )


def _stream(corpus: Corpus, tokenizer: Encoder, limit: int | None) -> tuple[Ids, Ids]:
    """Token ids and the document that each is from, both [N]; documents beyond the limit are not even tokenized."""
    encoded: list[Ids] = []
    count = 0
    for document in corpus.documents:
        if limit is not None and count >= limit:
            break
        encoded.append(np.array(tokenizer.encode(document), dtype=np.int64))
        count += len(encoded[-1])
    ids_N = np.concatenate(encoded)
    document_N = np.repeat(np.arange(len(encoded), dtype=np.int64), [len(ids) for ids in encoded])
    return ids_N[:limit], document_N[:limit]


def _pieces(count: int, window: int, bos: int) -> Iterator[slice]:
    """Which of `count` tokens each window holds; a last one that would have a single token is left out."""
    step = window - bos
    for begin in range(0, count, step):
        if min(step, count - begin) + bos >= 2:
            yield slice(begin, min(begin + step, count))


def _spread(pieces: list[slice], limit: int, step: int, bos: int) -> Iterator[slice]:
    """Of all windows, whole ones at even distances, the last cut short so that they hold `limit` tokens together."""
    whole, rest = divmod(limit, step)
    count = whole + (rest + bos >= 2)
    for number in range(count):
        piece = pieces[number * len(pieces) // count]
        yield piece if number < whole else slice(piece.start, piece.start + rest)


def _digest(ids: tuple[Ids, ...]) -> str:
    digest = hashlib.sha256()
    for ids_T in ids:
        digest.update(len(ids_T).to_bytes(8, "little"))
        digest.update(ids_T.astype("<i8").tobytes())
    return digest.hexdigest()
