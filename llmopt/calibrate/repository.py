"""Where a dataset's files are: a folder, or the Hugging Face Hub and its cache.

`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` and `HF_ENDPOINT` mean what they mean to huggingface_hub. No code of a dataset
runs: only its data files are read.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from llmopt.errors import DataError
from llmopt.progress import Progress, Silent

README = "README.md"
LARGEST_FILE = 4_000_000_000  # bytes, that are fetched to read some text


class Repository(Protocol):
    """A dataset's files by their names, and each as a file of this machine."""

    @property
    def commit(self) -> str | None:
        """Of the Hub."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """All names, with `/` between folders."""
        ...

    def fetch(self, name: str) -> Path:
        """One file, which may have to be downloaded."""
        ...


@dataclass(frozen=True, slots=True)
class Folder:
    """A dataset in a folder; that of a cache has only what was fetched before."""

    path: Path
    commit: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Those that are there."""
        found = (path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file())
        return tuple(sorted(name for name in found if not name.startswith(".")))

    def fetch(self, name: str) -> Path:
        """It is here."""
        return self.path / name


@dataclass(frozen=True, slots=True)
class OnHub:
    """A commit of a dataset on the Hub."""

    name: str
    commit: str
    files: tuple[str, ...] = field(repr=False)
    progress: Progress

    def fetch(self, name: str) -> Path:
        """One file, from the cache or through it.

        Raises:
            DataError: it cannot be fetched, or is far larger than text that a model is fitted to.
        """
        import huggingface_hub as hub  # noqa: PLC0415

        from llmopt.model.hub_errors import DATASET, explained, hidden_bars  # noqa: PLC0415

        cached = hub.try_to_load_from_cache(self.name, name, revision=self.commit, repo_type="dataset")
        if isinstance(cached, str):
            return Path(cached)
        with explained(self.name, self.commit, DATASET):
            url = hub.hf_hub_url(self.name, name, revision=self.commit, repo_type="dataset")
            size = hub.get_hf_file_metadata(url).size or 0
        if size > LARGEST_FILE:
            hint = "name a smaller config, or give a part of it as a .jsonl file"
            raise DataError(f"{name} has {size / 1e9:,.1f} GB, too much to fetch for text", where=self.name, hint=hint)
        if name != README:
            self.progress.say(f"fetching {name} of {self.name}: {size / 1e6:,.1f} MB")
        # huggingface_hub draws its own bars, with bytes and time left, on stderr.
        bars = hidden_bars() if isinstance(self.progress, Silent) else nullcontext()
        with explained(self.name, self.commit, DATASET), bars:
            return Path(hub.hf_hub_download(self.name, name, revision=self.commit, repo_type="dataset"))


def open_repository(name: str, revision: str | None, progress: Progress) -> Repository:
    """A folder of that name, or else the dataset on the Hub, at the commit that `revision` stands for.

    Raises:
        DataError: it is not there, not open to this user, or cannot be reached and is not in the cache.
    """
    if Path(name).is_dir():
        return Folder(Path(name))
    import huggingface_hub as hub  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    from llmopt.model.hub_errors import DATASET, explained, hidden_bars  # noqa: PLC0415

    with explained(name, revision, DATASET), hidden_bars():
        # A snapshot finds its way without the Hub as well, and knows at once when that is away.
        wanted = [README, ".gitattributes"]
        folder = Path(hub.snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=wanted))
        commit = folder.name
        try:
            # Not a listing of the tree, which tries for half a minute when the Hub is away.
            siblings = hub.HfApi().dataset_info(name, revision=commit).siblings or []
        except HfHubHTTPError:
            raise
        except Exception:  # the network's, whose classes change between versions: the Hub is away
            return Folder(folder, commit)
    return OnHub(name, commit, tuple(sorted(file.rfilename for file in siblings)), progress)
