"""Models on the Hugging Face Hub, through huggingface_hub and its cache.

`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` and `HF_ENDPOINT` mean what they mean there. Files that could be pickles are
never asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from llmopt.errors import ModelError
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
    with _explained(model, revision), _hidden_bars():
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
    bars = _hidden_bars() if isinstance(progress, Silent) else nullcontext()
    with _explained(model, commit), bars:
        snapshot_download(model, revision=commit, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)


def download_command(model: str, revision: str | None) -> str:
    """The command that brings a model into the cache, for a machine that may."""
    return f"hf download {model}" + (f" --revision {revision}" if revision else "")


@contextmanager
def _hidden_bars() -> Iterator[None]:
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    # Whatever the network does is one of the Hub's errors or one of its HTTP client's, which changes between versions.
    except Exception as error:
        raise _explain(error, model, revision) from error


def _explain(error: Exception, model: str, revision: str | None) -> ModelError:
    page = f"{constants.ENDPOINT}/{model}"
    match error:
        case HFValidationError():
            what, hint = "neither a file or folder here nor a name on the Hub", "names look like owner/name"
        case GatedRepoError():
            what = "the model is gated: its owner lets in those who ask"
            hint = f"ask at {page}, then set HF_TOKEN or run hf auth login"
        case RepositoryNotFoundError():
            what = "there is no such folder here, and no such model on the Hub that this user may see"
            hint = f"check the name; for a private model set HF_TOKEN or run hf auth login ({page})"
        case RevisionNotFoundError():
            what, hint = f"the model has no revision {revision!r}", f"look at {page}/tree/main"
        case LocalEntryNotFoundError():
            return _not_here(error, model, revision)
        case HfHubHTTPError():
            what = f"the Hub answered {error.response.status_code}"
            hint = "check HF_TOKEN" if error.response.status_code in {401, 403} else "try again later"
        case _:
            what, hint = f"the model cannot be fetched: {type(error).__name__}: {error}", "check network and disk"
    return ModelError(what, where=model, hint=hint)


def _not_here(error: Exception, model: str, revision: str | None) -> ModelError:
    """Not in the cache, and the Hub was not asked or did not answer."""
    command = download_command(model, revision)
    if constants.HF_HUB_OFFLINE:
        hint = f"unset it and run {command}, or run that on another machine and copy its HF_HOME"
        return ModelError("the model is not on this machine, and HF_HUB_OFFLINE is set", where=model, hint=hint)
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        return _explain(cause, model, revision)
    reason = f" ({type(cause).__name__}: {cause})" if cause else ""
    what = f"the model is not on this machine, and {constants.ENDPOINT} cannot be reached{reason}"
    return ModelError(what, where=model, hint=f"check the network, then run {command}")
