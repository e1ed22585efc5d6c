"""Models on the Hugging Face Hub, through huggingface_hub and its cache.

`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` and `HF_ENDPOINT` mean what they mean there. Files that could be pickles are
never asked for.
"""

from contextlib import nullcontext
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from llmopt.errors import ModelError
from llmopt.model.hub_errors import MODEL, explained, hidden_bars
from llmopt.progress import Progress, Silent

_CONFIGS = ["config.json", "generation_config.json"]
_WANTED = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.model", "merges.txt"]
# Folders hold other formats of the same weights, `consolidated` is a second copy of them under other names.
_UNWANTED = ["*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"]


def fetch_config(model: str, *, revision: str | None) -> tuple[Path, str]:
    """The folder in the cache that holds the model's configs, and the commit that `revision` stands for.

    Raises:
        ModelError: the model is not there, not open to this user, cannot be reached, or has no config.
    """
    # A snapshot, though it is of two files: asking for a single file tries for half a minute when the Hub is away.
    with explained(model, revision), hidden_bars():
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=_CONFIGS))
    if not (folder / _CONFIGS[0]).is_file():
        hint = f"if it is a collection of .gguf files, fetch one and give the file: hf download {model} FILE"
        raise ModelError(f"the model has no {_CONFIGS[0]}", where=model, hint=hint)
    return folder, folder.name


def fetch_weights(model: str, *, commit: str, progress: Progress) -> None:
    """Bring safetensors, tokenizer and configs of a commit into the cache, into the folder that `fetch_config` gave.

    Raises:
        ModelError: something is missing, or cannot be fetched.
    """
    progress.say(f"fetching {model} from {constants.ENDPOINT}")
    # huggingface_hub draws its own bars, with bytes and time left, on stderr.
    bars = hidden_bars() if isinstance(progress, Silent) else nullcontext()
    with explained(model, commit), bars:
        snapshot_download(model, revision=commit, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)


def download_command(model: str, revision: str | None) -> str:
    """The command that brings a model into the cache, for a machine that may."""
    return MODEL.download_command(model, revision)
