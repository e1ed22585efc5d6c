"""What is wrong with a model, as far as it can be told before a weight is read."""

from pathlib import Path
from tempfile import TemporaryDirectory

from llmopt.artifact import MANIFEST, read_manifest
from llmopt.errors import UsageError
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.source import ModelSource
from llmopt.model.tokenizer import Tokenizer
from llmopt.words import counted

NAMED = 3  # tensors that a note names


def refuse_artifact(model: str) -> None:
    """An artifact's weights are quantized, and no source for another one.

    Raises:
        UsageError: that is what `model` names.
    """
    if (Path(model) / MANIFEST).is_file():
        source = read_manifest(Path(model)).source.name
        raise UsageError("this is an artifact of llmopt, not a model", where=model, hint=f"give its source, {source}")


def open_tokenizer(source: ModelSource) -> Tokenizer:
    """The model's tokenizer; a mistake in it names the model's own folder.

    Raises:
        ModelError: it has none, or one that cannot be read.
    """
    if source.folder is not None:
        return Tokenizer.from_folder(source.folder)
    with TemporaryDirectory() as folder:
        source.write_tokenizer(Path(folder))
        return Tokenizer.from_folder(Path(folder))


def unknown_tensors_note(source: ModelSource) -> str | None:
    """A sentence that names tensors which the checkpoint holds and the model has no use for.

    Raises:
        ModelError: a file is damaged, or a tensor is missing or has another shape.
    """
    with open_checkpoint(source) as checkpoint:
        unknown = checkpoint.unknown
    if not unknown:
        return None
    others = [f"and {len(unknown) - NAMED} more"] if len(unknown) > NAMED else []
    names = ", ".join([*unknown[:NAMED], *others])
    return f"the checkpoint holds {counted(len(unknown), 'tensor')} that the model does not use: {names}"
