"""Where a model comes from: `demo`, a folder, a `.gguf` file, or the Hugging Face Hub.

Opening a source reads its config, never its weights, and runs no code of the model's own.
"""

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmopt.errors import ModelError, UsageError
from llmopt.model import safetensors_files
from llmopt.model.families import spec_from_config
from llmopt.model.json_file import read_object
from llmopt.model.refusals import (
    CONVERT_PICKLES,
    GGUF_SUFFIX,
    PICKLE_SUFFIXES,
    no_config,
    not_a_model,
    require_plain,
    require_safetensors,
)
from llmopt.model.spec import ModelSpec
from llmopt.model.stored import open_file
from llmopt.progress import Progress, Silent

DEMO = "demo"
CONFIG = "config.json"
QUANTIZATION = "quantization_config"  # of a config
GENERATION_CONFIG = "generation_config.json"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_FILE_SUFFIXES = (GGUF_SUFFIX, *PICKLE_SUFFIXES, ".safetensors", ".json", ".onnx")
_READ_AT_ONCE = 1 << 22  # bytes
_SILENT = Silent()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that was found. Either `folder` or `gguf` is set; `revision` is the commit of a model from the Hub.

    `trust_remote_code` is what the user typed. Nothing in here acts on it; whoever opens a tokenizer passes it on.
    """

    name: str
    config: Mapping[str, Any] = field(repr=False)
    spec: ModelSpec = field(repr=False)
    generation_config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    folder: Path | None = None
    gguf: Path | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """What the config says of weights that are quantized; None if it says nothing."""
        said = self.config.get(QUANTIZATION)
        return said if isinstance(said, Mapping) else None

    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the weights.

        Raises:
            ModelError: there are none, or the index names one that is missing or outside the folder.
        """
        if self.gguf is not None:
            return (self.gguf,)
        assert self.folder is not None
        return safetensors_files.weight_files(self.folder)

    def fingerprint(self) -> str:
        """SHA-256, in hex, over the config and the bytes of every weight file, with their names.

        Raises:
            ModelError: a weight file is missing or cannot be read.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in self.weight_files():
            digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
            for part in _parts(path):
                digest.update(part)
        return digest.hexdigest()

    def tokenizer_files(self) -> tuple[Path, ...]:
        """Those of the tokenizer's files that the folder holds; a GGUF file has its tokenizer inside."""
        if self.folder is None:
            return ()
        paths = (self.folder / name for name in _TOKENIZER_FILES)
        return tuple(path for path in paths if path.is_file())

    def write_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer's files into `folder`: copied, or converted from what a GGUF file holds.

        Raises:
            ModelError: the model has no tokenizer, or one that transformers cannot convert.
        """
        if self.gguf is not None:
            _convert_tokenizer(self.gguf, folder)
            return
        files = self.tokenizer_files()
        if not files:
            raise ModelError("the model has no tokenizer", where=str(self.folder), hint="add its tokenizer.json")
        for path in files:
            shutil.copyfile(path, folder / path.name)


def open_source(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    quantized: bool = False,
    progress: Progress = _SILENT,
) -> ModelSource:
    """Find a model and describe it. What exists on this machine is never looked for elsewhere.

    Args:
        model: `demo`, a folder, a `.gguf` file, or a name on the Hub.
        revision: branch, tag or commit of a model on the Hub.
        trust_remote_code: kept for those who open the tokenizer; weights and config never need it.
        weights: whether they will be read. Without, a config is enough, and nothing else is fetched.
        quantized: whether weights may be stored as integers; `quantization` then says how.
        progress: where a download is announced.

    Raises:
        UsageError: a revision was given for something that is not on the Hub.
        ModelError: the model does not exist, cannot be fetched, is pickled, or its config is damaged.
        UnsupportedError: its family is not supported, or its weights are quantized already and may not be.
    """
    if not model:
        raise UsageError("the model's name is empty", hint=f"a folder, a name on the Hub, or {DEMO}")
    how = _How(weights=weights, quantized=quantized, trust_remote_code=trust_remote_code)
    path = Path(os.path.expanduser(model))  # unlike pathlib's, it leaves the home of an unknown user as it is
    local = model == DEMO or path.exists() or _looks_like_path(model)
    if local and revision is not None:
        raise UsageError("--revision names a commit on the Hub, and this model is not from there", where=model)
    if model == DEMO:
        from llmopt import demo  # noqa: PLC0415 (most models are not this one)

        return _from_folder(model, demo.folder(), how)
    if path.is_dir():
        return _from_folder(model, path, how)
    if path.is_file():
        return _from_file(model, path)
    if local:
        raise ModelError("there is no such file or folder", where=model, hint="check the path")
    if difflib.get_close_matches(model, [DEMO], cutoff=0.7):
        raise ModelError("there is no such file or folder", where=model, hint=f"did you mean {DEMO!r}?")
    return _from_hub(model, revision, how, progress)


def _looks_like_path(model: str) -> bool:
    """A name on the Hub is `name` or `owner/name`; dots in it are common (`Qwen2.5-0.5B`), so few suffixes count."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(("/", *_FILE_SUFFIXES))


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """What `open_source` was asked for."""

    weights: bool
    quantized: bool
    trust_remote_code: bool


def _from_hub(model: str, revision: str | None, how: _How, progress: Progress) -> ModelSource:
    """The config comes first: a model that cannot be used is refused before its weights are fetched."""
    from llmopt.model import hub  # noqa: PLC0415 (huggingface_hub is needed for this only)

    folder, commit = hub.fetch_config(model, revision=revision)
    source = _from_folder(model, folder, replace(how, weights=False), revision=commit)
    if how.weights:
        hub.fetch_weights(model, commit=commit, progress=progress)
        require_safetensors(folder, hint=f"{hub.download_command(model, revision)}; {CONVERT_PICKLES}")
    return source


def _from_file(model: str, path: Path) -> ModelSource:
    if path.suffix != GGUF_SUFFIX:
        raise not_a_model(path)
    from llmopt.model.gguf_file import read_config  # noqa: PLC0415 (needs gguf, which other models do not)

    config = read_config(path)
    return ModelSource(name=model, config=config, spec=spec_from_config(config, where=str(path)), gguf=path)


def _from_folder(model: str, folder: Path, how: _How, revision: str | None = None) -> ModelSource:
    path, generation = folder / CONFIG, folder / GENERATION_CONFIG
    if not path.is_file():
        raise no_config(folder)
    config = read_object(path)
    require_plain(config, where=str(path), quantized=how.quantized)
    plain = {name: value for name, value in config.items() if name != QUANTIZATION}
    if how.weights:
        require_safetensors(folder, hint="put the model's .safetensors files beside its config.json")
    return ModelSource(
        name=model,
        folder=folder,
        config=config,
        spec=spec_from_config(plain, where=str(path)),
        generation_config=read_object(generation) if generation.is_file() else {},
        revision=revision,
        trust_remote_code=how.trust_remote_code,
    )


def _parts(path: Path) -> Iterator[bytes]:
    with open_file(path) as file:
        while part := file.read(_READ_AT_ONCE):
            yield part


def _convert_tokenizer(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415 (slow to import)

    try:
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
    except Exception as error:
        what = f"transformers cannot convert the tokenizer: {error}"
        raise ModelError(what, where=str(gguf), hint="use the model's Hugging Face folder") from error
