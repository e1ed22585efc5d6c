"""Where what was computed once is kept for later runs."""

import os
from pathlib import Path

CACHE_VARIABLE = "LLMOPT_CACHE"


def cache_folder() -> Path:
    """`LLMOPT_CACHE`, or `llmopt` in the user's cache folder."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmopt"
