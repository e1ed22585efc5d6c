"""Models from the Hub, against a server on this machine that speaks as much of its protocol as is needed.

Each model is opened in a process of its own: huggingface_hub reads its environment when it is imported.
"""

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

import pytest

COMMITS = {"main": "a" * 40, "old": "b" * 40}
TOKEN = "hf_let_me_in"
OPEN = """
import json, sys
from llmopt.errors import LlmoptError
from llmopt.model.safetensors_files import read_tables
from llmopt.model.source import open_source
options = json.loads(sys.argv[1])
try:
    source = open_source(**options)
    if options.get("weights", True):
        read_tables(source.folder)
except LlmoptError as error:
    print(json.dumps({"error": type(error).__name__, "what": error.what, "where": error.where, "hint": error.hint}))
else:
    folder = str(source.folder)
    files = sorted(path.relative_to(folder).as_posix() for path in source.folder.rglob("*") if path.is_file())
    width = source.spec.hidden_size
    print(json.dumps({"folder": folder, "revision": source.revision, "files": files, "hidden_size": width}))
"""


@dataclass
class Hub:
    """`files` by model; `owner/gated` is open to `TOKEN` only. `asked` is every request, as (method, path)."""

    home: Path
    files: dict[str, dict[str, bytes]]
    asked: list[tuple[str, str]] = field(default_factory=list)
    port: int = 0

    def open(self, model: str, *, env: Mapping[str, str] = {}, **options: Any) -> dict[str, Any]:
        settings = {"HF_HOME": str(self.home), "HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HUB_OFFLINE": "0"}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", OPEN, json.dumps({"model": model, **options})],
            env={**inherited, **settings, **env},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def answer_for(hub: Hub, path: str, token: str | None) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body."""
    parts = path.split("?", maxsplit=1)[0].strip("/").split("/")
    api = parts[:2] == ["api", "models"]
    owner, name, verb, revision, *rest = parts[2:] if api else parts
    files = hub.files.get(f"{owner}/{name}")
    commit = COMMITS.get(revision, revision)
    if files is None:
        return 401, {"X-Error-Code": "RepoNotFound"}, b""
    if commit not in COMMITS.values():
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    if verb == "revision":
        return 200, {}, json.dumps({"id": f"{owner}/{name}", "sha": commit, "siblings": []}).encode()
    if verb == "tree":
        entries = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40} for file in files]
        return 200, {}, json.dumps(entries).encode()
    if name == "gated" and token != f"Bearer {TOKEN}":
        return 403, {"X-Error-Code": "GatedRepo"}, b""
    file = "/".join(rest)
    if file not in files:
        return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
    return 200, {"X-Repo-Commit": commit, "ETag": f'"{commit[:4]}-{file.replace("/", "-")}"'}, files[file]


@pytest.fixture
def hub(tmp_path: Path, folder: Path) -> Iterator[Hub]:
    model = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = ["tokenizer.json", "pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors", "run.py"]
    model |= dict.fromkeys(others, b"{}")
    pickled = {"config.json": model["config.json"], "pytorch_model.bin": b""}
    unknown = model | {"config.json": b'{"model_type": "mine"}'}
    repositories = {"owner/open": model, "owner/gated": model, "owner/pickled": pickled, "owner/unknown": unknown}
    hub = Hub(tmp_path / "home", repositories | {"owner/empty": {"README.md": b""}})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.asked.append((self.command, self.path))
            status, headers, body = answer_for(hub, self.path, self.headers["Authorization"])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
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


def test_a_model_is_fetched_once_and_then_kept(hub: Hub) -> None:
    first = hub.open("owner/open")
    assert (first["revision"], first["hidden_size"]) == (COMMITS["main"], 8)
    assert first["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert first["folder"].startswith(str(hub.home))
    fetched = {path.rsplit("/", 1)[-1] for method, path in hub.asked if method == "GET" and "/resolve/" in path}
    assert fetched == set(first["files"])

    hub.files.clear()
    assert hub.open("owner/open", env={"HF_HUB_OFFLINE": "1"}) == first
    assert hub.open("owner/open", env={"HF_ENDPOINT": "http://127.0.0.1:1"}) == first


def test_a_config_comes_alone_when_no_weights_are_wanted(hub: Hub) -> None:
    hub.files["owner/open"]["generation_config.json"] = b'{"temperature": 1}'
    assert hub.open("owner/open", weights=False)["files"] == ["config.json", "generation_config.json"]
    assert "safetensors" not in str(hub.asked)
    missing = hub.open("owner/open", env={"HF_HUB_OFFLINE": "1"})
    assert missing["error"] == "ModelError"
    assert "hf download owner/open" in missing["hint"]


def test_a_model_that_cannot_be_used_is_refused_before_its_weights_are_fetched(hub: Hub) -> None:
    assert hub.open("owner/unknown")["error"] == "UnsupportedError"
    assert "safetensors" not in str(hub.asked)


def test_a_revision_is_resolved_to_its_commit(hub: Hub) -> None:
    assert hub.open("owner/open", revision="old", weights=False)["revision"] == COMMITS["old"]
    assert hub.open("owner/open", revision=COMMITS["old"], weights=False)["revision"] == COMMITS["old"]
    wrong = hub.open("owner/open", revision="none")
    assert (wrong["error"], wrong["what"]) == ("ModelError", "the model has no revision 'none'")


def test_a_gated_model_needs_a_token(hub: Hub) -> None:
    closed = hub.open("owner/gated")
    assert (closed["error"], closed["where"]) == ("ModelError", "owner/gated")
    assert "gated" in closed["what"]
    assert "HF_TOKEN" in closed["hint"]
    assert hub.open("owner/gated", env={"HF_TOKEN": TOKEN})["hidden_size"] == 8


@pytest.mark.parametrize(
    ("model", "what", "hint"),
    [
        ("owner/none", "no such model on the Hub", "check the name"),
        ("owner/empty", "has no config.json", "hf download owner/empty FILE"),
        ("owner/pickled", "has no safetensors file", "save_pretrained"),
        ("a name with spaces", "neither a file or folder here nor a name on the Hub", "owner/name"),
    ],
)
def test_what_cannot_be_opened_is_refused_with_the_way_out(hub: Hub, model: str, what: str, hint: str) -> None:
    refused = hub.open(model)
    assert refused["error"] == "ModelError"
    assert what in refused["what"]
    assert hint in refused["hint"]


@pytest.mark.parametrize(
    ("env", "what"),
    [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"), ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "cannot be reached")],
)
def test_a_model_that_is_not_here_is_missed_quickly(hub: Hub, env: Mapping[str, str], what: str) -> None:
    start = time.monotonic()
    missing = hub.open("owner/open", env=env, revision="old")
    assert time.monotonic() - start < 10
    assert (missing["error"], missing["where"]) == ("ModelError", "owner/open")
    assert what in missing["what"]
    assert "hf download owner/open --revision old" in missing["hint"]
    assert not hub.asked
