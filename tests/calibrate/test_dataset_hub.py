"""Datasets on the Hub, as a server on this machine plays it; each is read in a process of its own, for its settings."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

COMMITS = {"main": "a" * 40, "old": "b" * 40}
TOKEN = "hf_let_me_in"
READ = """
import json, sys
from llmopt.calibrate.load import TO_FIT, load_text
from llmopt.errors import LlmoptError
from llmopt.progress import Silent
try:
    corpus = load_text(sys.argv[1], TO_FIT, Silent())
except LlmoptError as error:
    print(json.dumps({"error": type(error).__name__, "what": error.what, "where": error.where, "hint": error.hint}))
else:
    print(json.dumps({"name": corpus.name, "documents": corpus.documents, "sha256": corpus.sha256}))
"""
README = b"""---
configs:
- config_name: raw
  data_files:
  - {split: train, path: raw/train-*}
  - {split: test, path: raw/test-*}
---
"""


@dataclass
class Hub:
    """`files` by dataset; `owner/gated` is open to `TOKEN` only. `asked` is every request; `sizes` are pretended."""

    home: Path
    files: dict[str, dict[str, bytes]]
    sizes: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    port: int = 0

    def read(self, name: str, *, env: Mapping[str, str] = {}) -> dict[str, Any]:
        settings = {"HF_HOME": str(self.home), "HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HUB_OFFLINE": "0"}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", READ, name],
            env={**inherited, **settings, **env},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def fetched(self) -> set[str]:
        return {path.rsplit("/", 1)[-1] for method, path in self.asked if method == "GET" and "/resolve/" in path}

    def answer(self, path: str, token: str | None) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body."""
        parts = path.split("?", maxsplit=1)[0].strip("/").split("/")
        kind, owner, name, verb, revision, *rest = parts[1:] if parts[0] == "api" else parts
        files = self.files.get(f"{owner}/{name}") if kind == "datasets" else None
        commit = COMMITS.get(revision, revision)
        if files is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if commit not in COMMITS.values():
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if name == "gated" and token != f"Bearer {TOKEN}":
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if verb == "revision":
            siblings = [{"rfilename": file} for file in files]
            return 200, {}, json.dumps({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}).encode()
        if verb == "tree":
            entries = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in files]
            return 200, {}, json.dumps(entries).encode()
        file = "/".join(rest)
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{commit[:4]}-{file.replace("/", "-")}"'}, files[file]


def table(*rows: str) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.table({"text": rows}), file)
    return file.getvalue()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    stories = {
        "README.md": README,
        "raw/train-00000-of-00002.parquet": table("a", "b"),
        "raw/train-00001-of-00002.parquet": table("c"),
        "raw/test-00000-of-00001.parquet": table("d"),
        "huge.py": b"raise SystemExit",
    }
    bare = {"train.jsonl": b'{"text": "e"}\n'}
    repositories = {"owner/stories": stories, "owner/gated": bare, "owner/bare": bare, "owner/empty": {"x.bin": b""}}
    hub = Hub(tmp_path / "home", repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.asked.append((self.command, self.path))
            status, headers, body = hub.answer(self.path, self.headers["Authorization"])
            size = hub.sizes.get(self.path.rsplit("/", 1)[-1], len(body))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(size)}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.port = server.server_port
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def test_a_split_is_fetched_once_without_the_others_and_then_kept(hub: Hub) -> None:
    first = hub.read("owner/stories")
    assert first["documents"] == ["a", "b", "c"]
    assert hub.fetched() == {"README.md", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"}

    hub.files.clear()
    assert hub.read("owner/stories", env={"HF_HUB_OFFLINE": "1"}) == first
    assert hub.read("owner/stories", env={"HF_ENDPOINT": "http://127.0.0.1:1"}) == first


def test_the_name_of_what_was_read_means_that_for_ever(hub: Hub) -> None:
    newest, old = hub.read("owner/stories::test"), hub.read("owner/stories@old::test")
    assert newest["name"] == f"owner/stories@{COMMITS['main']}:raw:test:text"
    assert old["name"] == f"owner/stories@{COMMITS['old']}:raw:test:text"
    assert hub.read(old["name"]) == old


def test_what_is_here_wins_over_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.calibrate.load import TO_FIT, load_text
    from llmopt.progress import Silent

    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/bare").mkdir(parents=True)
    (tmp_path / "owner/bare/train.jsonl").write_text('{"text": "mine"}\n')
    assert load_text("owner/bare", TO_FIT, Silent()).documents == ("mine",)
    assert not hub.asked


def test_a_part_that_was_never_fetched_is_missed_without_the_hub(hub: Hub) -> None:
    hub.files["owner/stories"]["raw/train-00001-of-00002.parquet"] = b"broken"
    assert hub.read("owner/stories")["error"] == "DataError"
    for path in hub.home.rglob("train-00001-of-00002.parquet"):
        path.unlink()
    missing = hub.read("owner/stories", env={"HF_HUB_OFFLINE": "1"})
    assert missing["error"] == "DataError"
    assert "train-00001-of-00002.parquet is not here" in missing["what"]
    assert "hf download owner/stories" in missing["hint"]


def test_a_gated_dataset_needs_a_token(hub: Hub) -> None:
    closed = hub.read("owner/gated")
    assert (closed["error"], closed["where"]) == ("DataError", "owner/gated")
    assert "the dataset is gated" in closed["what"]
    assert "/datasets/owner/gated, then set HF_TOKEN" in closed["hint"]
    assert hub.read("owner/gated", env={"HF_TOKEN": TOKEN})["documents"] == ["e"]


def test_a_file_far_larger_than_what_is_read_is_not_fetched(hub: Hub) -> None:
    hub.sizes["test-00000-of-00001.parquet"] = 5_000_000_000
    refused = hub.read("owner/stories::test")
    assert refused["error"] == "DataError"
    assert "has 5.0 GB, too much to fetch" in refused["what"]
    assert hub.fetched() == {"README.md"}


@pytest.mark.parametrize(
    ("name", "error", "what", "hint"),
    [
        ("owner/none", "DataError", "no such dataset on the Hub", "check the name"),
        ("owner/empty", "DataError", "no files that can be read", "refs/convert/parquet"),
        ("owner/stories@none", "DataError", "the dataset has no revision 'none'", "/datasets/owner/stories"),
        ("owner/stories:rwa", "UsageError", "no config 'rwa'", "did you mean 'raw'?"),
        ("owner/stories::trian", "UsageError", "no split 'trian'", "did you mean 'train'?"),
        ("owner/stories:::txt", "UsageError", "no column 'txt'", "did you mean 'text'?"),
    ],
)
def test_what_is_not_there_is_refused_with_the_way_out(hub: Hub, name: str, error: str, what: str, hint: str) -> None:
    refused = hub.read(name)
    assert refused["error"] == error
    assert what in refused["what"]
    assert hint in refused["hint"]


@pytest.mark.parametrize(
    ("env", "what"),
    [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"), ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "cannot be reached")],
)
def test_a_dataset_that_is_not_here_is_missed_quickly(hub: Hub, env: Mapping[str, str], what: str) -> None:
    start = time.monotonic()
    missing = hub.read("owner/stories@old", env=env)
    assert time.monotonic() - start < 10
    assert (missing["error"], missing["where"]) == ("DataError", "owner/stories")
    assert what in missing["what"]
    assert "hf download owner/stories --repo-type dataset --revision old" in missing["hint"]
    assert not hub.asked
