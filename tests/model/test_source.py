"""A model is found where its name says, described from its config alone, or refused with the way out."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmopt.errors import ModelError, UnsupportedError, UsageError
from llmopt.model.source import open_source


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_folder_is_described_from_its_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    source = open_source(str(folder))
    assert (source.name, source.folder, source.gguf, source.revision) == (str(folder), folder, None, None)
    assert (source.spec.family, len(source.spec.blocks)) == ("llama", 2)
    assert source.config["model_type"] == "llama"
    assert source.generation_config == {"temperature": 0.6}


@pytest.mark.usefixtures("no_network")
def test_what_exists_here_is_not_looked_for_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "owner").mkdir()
    shutil.move(folder, folder.parent / "owner" / "name")
    assert open_source("owner/name").folder == Path("owner/name")


@pytest.mark.usefixtures("no_network")
def test_the_demo_model_is_always_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmopt.demo.folder", lambda: folder)
    source = open_source("demo")
    assert (source.name, source.folder) == ("demo", folder)


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_source("~/model").folder == folder


def test_a_config_is_enough_when_no_weights_are_wanted(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert open_source(str(folder), weights=False).spec.hidden_size == 8
    with pytest.raises(ModelError, match="no safetensors file"):
        open_source(str(folder))


def test_a_config_is_read_without_torch(folder: Path) -> None:
    """So that describing a model takes no longer than reading its config."""
    script = f"""
import sys
from llmopt.model.source import open_source
open_source({str(folder)!r})
assert not {{"torch", "transformers", "huggingface_hub", "gguf"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    "name", ["./none", "/none/here", "~/none", "~nobody-here/x", "a/b/c", "none/", "none.gguf", "owner/none.bin"]
)
@pytest.mark.usefixtures("no_network")
def test_a_path_that_leads_nowhere_is_not_taken_for_a_name(name: str) -> None:
    with pytest.raises(ModelError, match="no such file or folder") as caught:
        open_source(name)
    assert caught.value.where == name
    assert caught.value.exit_code == 3


def test_a_revision_needs_the_hub(folder: Path) -> None:
    for model in (str(folder), "demo", "./none"):
        with pytest.raises(UsageError, match="--revision"):
            open_source(model, revision="main")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_are_not_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pytorch_model{suffix}"
    torch.save({"weight": torch.ones(1)}, path)
    with pytest.raises(ModelError, match="pickled weights are not opened") as caught:
        open_source(str(path))
    assert "save_pretrained" in str(caught.value.hint)


def test_a_folder_of_pickles_is_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not opened") as caught:
        open_source(str(folder))
    assert caught.value.where == str(folder / "pytorch_model.bin")
    assert "save_pretrained" in str(caught.value.hint)


def test_pickles_beside_safetensors_are_passed_over(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert open_source(str(folder)).weight_files() == (folder / "model.safetensors",)


@pytest.mark.parametrize(
    ("file", "hint"),
    [("model.safetensors", "give the folder it lies in"), ("config.json", "give a folder or a .gguf file")],
)
def test_a_file_of_the_folder_is_not_the_model(folder: Path, file: str, hint: str) -> None:
    with pytest.raises(ModelError, match="this file is not a model") as caught:
        open_source(str(folder / file))
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("beside", "hint"), [("a.gguf", "give the file: .*a.gguf"), ("a.bin", "convert"), ("a.txt", "Hugging Face")]
)
def test_a_folder_without_config_says_what_it_may_be(tmp_path: Path, beside: str, hint: str) -> None:
    (tmp_path / beside).touch()
    with pytest.raises(ModelError, match=rf"no config\.json\n.*\n.*{hint}"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", "names no model_type")],
)
def test_a_damaged_config_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(str(folder))
    assert caught.value.where == str(folder / "config.json")


def test_quantized_weights_are_refused_by_their_method(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedError, match=r"already quantized \(gptq\)"):
        open_source(str(folder))


@pytest.mark.parametrize("trusted", [False, True])
def test_a_models_own_code_is_never_run(folder: Path, trusted: bool) -> None:
    change_config(folder, model_type="mine", auto_map={"AutoConfig": "configuration_mine.MyConfig"})
    (folder / "configuration_mine.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UnsupportedError, match="brings its own code for model_type 'mine'"):
        open_source(str(folder), trust_remote_code=trusted)


def test_own_code_beside_a_known_family_does_not_matter(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_mine.MyModel"})
    assert open_source(str(folder)).spec.family == "llama"
    assert open_source(str(folder), trust_remote_code=True).trust_remote_code


def test_the_fingerprint_is_that_of_the_content(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (0, 0))
    assert open_source(str(folder)).fingerprint() == open_source(str(copy)).fingerprint()


def flip_last_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize("change", [flip_last_byte, lambda folder: change_config(folder, rope_theta=5e5)])
def test_the_fingerprint_sees_every_change(folder: Path, change: Callable[[Path], None]) -> None:
    before = open_source(str(folder)).fingerprint()
    change(folder)
    assert open_source(str(folder)).fingerprint() != before


def test_the_tokenizer_is_copied_whole(folder: Path, tmp_path: Path) -> None:
    files = {"tokenizer.json": "{}", "tokenizer_config.json": '{"a": 1}', "chat_template.jinja": "{{ messages }}"}
    for name, text in (files | {"README.md": "not part of it"}).items():
        (folder / name).write_text(text)
    source, out = open_source(str(folder)), tmp_path / "out"
    out.mkdir()
    assert {path.name for path in source.tokenizer_files()} == files.keys()
    source.write_tokenizer(out)
    assert {path.name: path.read_text() for path in out.iterdir()} == files


def test_a_model_without_tokenizer_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer"):
        open_source(str(folder)).write_tokenizer(tmp_path)
