"""What the Hugging Face Hub refuses, in words that say what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from llmopt.errors import DataError, LlmoptError, ModelError


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of repository: its word, the error that is raised for it, and what its pages and commands have more."""

    word: str
    error: type[LlmoptError]
    page: str = ""
    option: str = ""

    def download_command(self, name: str, revision: str | None) -> str:
        """The command that brings one into the cache, for a machine that may."""
        return f"hf download {name}{self.option}" + (f" --revision {revision}" if revision else "")


MODEL = Kind("model", ModelError)
DATASET = Kind("dataset", DataError, page="datasets/", option=" --repo-type dataset")


@contextmanager
def hidden_bars() -> Iterator[None]:
    """Without the progress bars that huggingface_hub draws by itself."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def explained(name: str, revision: str | None, kind: Kind = MODEL) -> Iterator[None]:
    """Turns whatever the Hub and the network refuse into the kind's error."""
    try:
        yield
    # Whatever the network does is one of the Hub's errors or one of its HTTP client's, which changes between versions.
    except Exception as error:
        raise _explain(error, name, revision, kind) from error


def _explain(error: Exception, name: str, revision: str | None, kind: Kind) -> LlmoptError:
    page = f"{constants.ENDPOINT}/{kind.page}{name}"
    match error:
        case HFValidationError():
            what, hint = "neither a file or folder here nor a name on the Hub", "names look like owner/name"
        case GatedRepoError():
            what = f"the {kind.word} is gated: its owner lets in those who ask"
            hint = f"ask at {page}, then set HF_TOKEN or run hf auth login"
        case RepositoryNotFoundError():
            what = f"there is no such folder here, and no such {kind.word} on the Hub that this user may see"
            hint = f"check the name; for a private {kind.word} set HF_TOKEN or run hf auth login ({page})"
        case RevisionNotFoundError():
            what, hint = f"the {kind.word} has no revision {revision!r}", f"look at {page}/tree/main"
        case LocalEntryNotFoundError():
            return _not_here(error, name, revision, kind)
        case HfHubHTTPError():
            what = f"the Hub answered {error.response.status_code}"
            hint = "check HF_TOKEN" if error.response.status_code in {401, 403} else "try again later"
        case _:
            what = f"the {kind.word} cannot be fetched: {type(error).__name__}: {error}"
            hint = "check network and disk"
    return kind.error(what, where=name, hint=hint)


def _not_here(error: Exception, name: str, revision: str | None, kind: Kind) -> LlmoptError:
    """Not in the cache, and the Hub was not asked or did not answer."""
    command = kind.download_command(name, revision)
    if constants.HF_HUB_OFFLINE:
        hint = f"unset it and run {command}, or run that on another machine and copy its HF_HOME"
        return kind.error(f"the {kind.word} is not on this machine, and HF_HUB_OFFLINE is set", where=name, hint=hint)
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        return _explain(cause, name, revision, kind)
    reason = f" ({type(cause).__name__}: {cause})" if cause else ""
    what = f"the {kind.word} is not on this machine, and {constants.ENDPOINT} cannot be reached{reason}"
    return kind.error(what, where=name, hint=f"check the network, then run {command}")
