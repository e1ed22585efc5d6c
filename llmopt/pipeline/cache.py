"""Where what was computed once is kept for later runs."""

import os
from pathlib import Path

from llmopt.errors import ArtifactError

CACHE_VARIABLE = "LLMOPT_CACHE"


def cache_folder() -> Path:
    """`LLMOPT_CACHE`, or `llmopt` in the user's cache folder."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmopt"


def writable_cache(part: str) -> Path:
    """A folder of the cache, made if it is not there.

    Raises:
        ArtifactError: it cannot be made or written to.
    """
    folder = cache_folder() / part
    hint = f"set {CACHE_VARIABLE} to a folder that you may write to"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"llmopt's cache cannot be made: {error.strerror}", where=str(folder), hint=hint) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArtifactError("llmopt's cache cannot be written to", where=str(folder), hint=hint)
    return folder
