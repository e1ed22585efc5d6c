"""Text to token ids and back, with the tokenizer that lies in a model's folder.

The `tokenizers` library does the work. `tokenizer.json` is read as it is; transformers is imported only for folders
that hold nothing but an older format (`tokenizer.model`, `vocab.json` with `merges.txt`), which it converts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from llmopt.errors import ModelError
from llmopt.model.chat import render
from llmopt.model.json_file import read_object

_OLDER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_UNFINISHED = "\ufffd"  # what decoders write for bytes that are no whole character


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer as its model expects it.

    `bos_id` is set only when the tokenizer itself puts a token before every text, which means that the model was
    trained so; that the vocabulary has such a token is not enough. `special_tokens` are `bos_token` and its like, by
    the names that chat templates use.
    """

    backend: tokenizers.Tokenizer
    where: str
    bos_id: int | None = None
    special_tokens: Mapping[str, str]
    chat_template: str | None = None

    @classmethod
    def from_folder(cls, path: Path) -> "Tokenizer":
        """Read the tokenizer that lies in a Hugging Face folder.

        Raises:
            ModelError: there is none, or a file of it cannot be read.
        """
        backend = _backend(path)
        # Saved settings of some training run; text is cut into windows here, and nowhere else.
        backend.no_truncation()
        backend.no_padding()
        config = _optional_object(path / "tokenizer_config.json")
        return cls(
            backend=backend,
            where=str(path),
            bos_id=_prepended(backend),
            special_tokens=_special_tokens(_optional_object(path / "special_tokens_map.json") | config),
            chat_template=_chat_template(path, config),
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; none is added before or behind it."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def stream(self, behind: Sequence[int] = ()) -> "DecodeStream":
        """Decode tokens one by one, as they come `behind` those of a prompt."""
        return DecodeStream(self, behind)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` knows what to write."""
        return self.chat_template is not None

    def chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, special tokens included; each message has a `role` and its `content`.

        Raises:
            ModelError: there is no chat template, or it refuses these messages.
        """
        if self.chat_template is None:
            raise ModelError("the model has no chat template", where=self.where, hint="give it text to continue")
        variables = {**self.special_tokens, "add_generation_prompt": add_generation_prompt}
        return render(self.chat_template, messages, variables, where=self.where)


class DecodeStream:
    """Gives text as soon as its last character is complete.

    What a token says depends on those around it: a leading space, a character cut in two. So each step decodes what
    it gave last, which begins and ends with whole characters, without and with the new tokens; it gives the difference.
    """

    def __init__(self, tokenizer: Tokenizer, behind: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(behind)
        self._given = len(self._ids)  # so many of them have been given as text

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty if it completes none."""
        self._ids.append(token_id)
        known = self._tokenizer.decode(self._ids[: self._given])
        text = self._tokenizer.decode(self._ids)
        if len(text) <= len(known) or text.endswith(_UNFINISHED):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return text[len(known) :]


def _backend(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        return _converted(path)
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    # The library raises nothing more precise.
    except Exception as error:
        raise ModelError(f"the tokenizer cannot be read: {error}", where=str(file), hint="fetch it again") from error


def _converted(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder without `tokenizer.json`."""
    if not any((path / name).is_file() for name in _OLDER_FILES):
        hint = f"put the model's tokenizer.json there, or one of {', '.join(_OLDER_FILES)}"
        raise ModelError("the model has no tokenizer", where=str(path), hint=hint)
    from transformers import AutoTokenizer  # noqa: PLC0415 (slow, and seldom needed)

    hint = "open it with transformers' AutoTokenizer, and save it from there as tokenizer.json"
    try:
        converted = AutoTokenizer.from_pretrained(str(path), local_files_only=True).backend_tokenizer
    # Each format fails in its own way, a package that is not installed included.
    except Exception as error:
        raise ModelError(f"the tokenizer cannot be converted: {error}", where=str(path), hint=hint) from error
    assert isinstance(converted, tokenizers.Tokenizer)
    return converted


def _prepended(backend: tokenizers.Tokenizer) -> int | None:
    """The token that the tokenizer's own post-processor puts before a text."""
    whole = backend.encode("a").ids
    bare = backend.encode("a", add_special_tokens=False).ids
    return whole[0] if len(whole) > len(bare) and whole[1 : 1 + len(bare)] == bare else None


def _optional_object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens are written down as they are, or as objects with their `content`."""
    entries = {name: config.get(name) for name in _SPECIAL}
    texts = {name: entry.get("content") if isinstance(entry, dict) else entry for name, entry in entries.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """From a file of its own, which wins, or from the config: one text, or several with names."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"the chat template cannot be read: {error}", where=str(file)) from error
    template = config.get("chat_template", _optional_object(path / "chat_template.json").get("chat_template"))
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
