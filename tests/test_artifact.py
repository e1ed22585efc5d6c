import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmopt import artifact
from llmopt.artifact import FileEntry, Manifest, Source
from llmopt.errors import ArtifactError, ResourceError


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def manifest(**changes):
    facts = {"source": Source(name="demo", fingerprint="f" * 64), "format": "onnx", "scheme": "w8a16-g64-sym"}
    return Manifest(**(facts | changes))


def write_artifact(folder, files=None, **changes):
    with artifact.staged(folder, force=False) as staging:
        for name, content in (files or {"model.onnx": b"graph"}).items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(content)
        artifact.write_manifest(staging, manifest(**changes))
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# A folder appears whole or not at all.


def test_a_staged_folder_appears_under_its_name_at_the_end(out):
    with artifact.staged(out, force=False) as folder:
        (folder / "a").write_text("x")
        assert not out.exists()
    assert names(out) == ["a"]
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("reason", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_behind(out, reason):
    def stage():
        with artifact.staged(out, force=False) as folder:
            (folder / "a").write_text("x")
            raise reason

    with pytest.raises(reason):
        stage()
    assert names(out.parent) == []


def test_an_exception_while_replacing_keeps_the_old_artifact(out):
    write_artifact(out)

    def stage():
        with artifact.staged(out, force=True) as folder:
            (folder / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage()
    assert names(out) == ["llmopt.json", "model.onnx"]
    assert names(out.parent) == ["out"]


def test_a_failing_rename_puts_the_old_artifact_back(out, monkeypatch):
    write_artifact(out)
    rename = Path.rename

    def failing(path, target):
        if path.suffix == ".partial":
            raise PermissionError(errno.EACCES, "no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError), artifact.staged(out, force=True):
        pass
    assert names(out) == ["llmopt.json", "model.onnx"]
    assert names(out.parent) == ["out"]


def test_force_replaces_an_artifact_and_leaves_no_trace_of_the_old_one(out):
    write_artifact(out)
    with artifact.staged(out, force=True) as folder:
        (folder / "new").write_text("x")
        assert names(out) == ["llmopt.json", "model.onnx"]
    assert names(out) == ["new"]
    assert names(out.parent) == ["out"]


def test_force_replaces_a_damaged_artifact(out):
    write_artifact(out)
    (out / "model.onnx").unlink()
    with artifact.staged(out, force=True) as folder:
        (folder / "new").write_text("x")
    assert names(out) == ["new"]


def test_force_replaces_an_empty_folder_and_what_was_measured_since(out):
    out.mkdir()
    with artifact.staged(out, force=True) as folder:
        artifact.write_manifest(folder, manifest())
    artifact.write_json(out / "report.json", {})
    (out / "README.md").write_text("card")
    with artifact.staged(out, force=True):
        pass
    assert names(out) == []


def test_an_output_that_exists_is_refused_before_any_work(out):
    out.mkdir()
    with pytest.raises(ArtifactError, match="exists already") as caught, artifact.staged(out, force=False):
        pytest.fail("the block ran")
    assert "--force" in caught.value.hint
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_what_others_put_there_while_the_block_ran_is_kept(out, force):
    def stage():
        with artifact.staged(out, force=force) as folder:
            (folder / "ours").write_text("x")
            out.mkdir()
            (out / "theirs").write_text("y")

    with pytest.raises(ArtifactError):
        stage()
    assert names(out) == ["theirs"]
    assert names(out.parent) == ["out"]


def test_of_two_that_write_the_same_the_later_is_refused(out):
    with pytest.raises(ArtifactError, match="in the meantime"), artifact.staged(out, force=False):
        write_artifact(out.with_name("other")).rename(out)  # as another process does it
    assert artifact.load_manifest(out, verify=True)


def test_force_is_not_advised_where_it_would_not_help(out):
    out.mkdir()
    (out / "photo").write_text("x")
    with pytest.raises(ArtifactError, match="did not write") as caught:
        artifact.check_destination(out, force=False)
    assert "--force" not in caught.value.hint


def test_a_parent_that_is_a_file_is_not_to_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="no folder") as caught:
        artifact.check_destination(tmp_path / "file" / "out", force=False)
    assert "mkdir" not in caught.value.hint


def test_a_missing_parent_is_refused_before_any_work(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"), artifact.staged(tmp_path / "no" / "out", force=False):
        pytest.fail("the block ran")


def test_the_hint_for_a_missing_parent_can_be_pasted_into_a_shell(tmp_path):
    with pytest.raises(ArtifactError) as caught:
        artifact.check_destination(tmp_path / "my folder" / "out", force=False)
    assert caught.value.hint == f"mkdir -p '{tmp_path / 'my folder'}'"


@pytest.mark.parametrize("force", [False, True])
def test_an_output_inside_another_artifact_is_refused(out, force):
    write_artifact(out)
    (out / "below").mkdir()
    for inside in (out / "sub", out / "below" / "sub"):
        with pytest.raises(ArtifactError, match="lies inside another artifact") as caught:
            artifact.check_destination(inside, force=force)
        assert caught.value.where == str(out)


def test_a_parent_that_cannot_be_written_is_refused(out, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ArtifactError, match="not writable"):
        artifact.check_destination(out, force=False)


def test_force_does_not_replace_a_folder_of_someone_else(out):
    (out / "photos").mkdir(parents=True)
    (out / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(ArtifactError, match="did not write"), artifact.staged(out, force=True):
        pytest.fail("the block ran")
    assert (out / "photos" / "cat.jpg").exists()


def test_force_does_not_replace_folders_without_files_either(out):
    (out / "projects").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="did not write"):
        artifact.check_destination(out, force=True)


def test_force_does_not_replace_a_folder_with_some_other_manifest(out):
    out.mkdir()
    (out / "llmopt.json").write_text('{"schema": "other/1"}')
    with pytest.raises(ArtifactError, match="other/1"):
        artifact.check_destination(out, force=True)


def test_force_does_not_take_notes_with_the_artifact(out):
    write_artifact(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"did not write: notes\.txt"):
        artifact.check_destination(out, force=True)


def test_force_replaces_neither_a_file_nor_the_working_folder(out, monkeypatch):
    out.write_text("mine")
    with pytest.raises(ArtifactError, match="not a folder"):
        artifact.check_destination(out, force=True)
    out.unlink()
    (write_artifact(out) / "inside").mkdir()
    monkeypatch.chdir(out / "inside")
    with pytest.raises(ArtifactError, match="working folder"):
        artifact.check_destination(out, force=True)


def test_a_link_is_followed_so_that_the_rename_stays_on_one_disk(tmp_path, out):
    (tmp_path / "elsewhere").mkdir()
    out.symlink_to(tmp_path / "elsewhere" / "real")
    write_artifact(out)
    assert out.is_symlink()
    assert names(tmp_path / "elsewhere") == ["real"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_resource_error(out, number):
    with pytest.raises(ResourceError, match="disk is full"), artifact.staged(out, force=False):
        raise OSError(number, os.strerror(number))
    assert names(out.parent) == []


def test_other_trouble_of_the_system_is_not_dressed_up_as_a_full_disk(out):
    with pytest.raises(PermissionError), artifact.staged(out, force=False):
        raise PermissionError(errno.EACCES, "no")


# What dead processes left.


def leftover(out, pid, state, host=None):
    path = out.with_name(f".{out.name}.llmopt-{host or socket.gethostname()}-{pid}.{state}")
    path.mkdir()
    (path / "half").write_text("x")
    return path


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_leftover_of_a_dead_process_is_cleared(out, dead_pid):
    leftover(out, dead_pid, "partial")
    leftover(out, os.getpid(), "partial")
    artifact.check_destination(out, force=False)
    assert names(out.parent) == []


def test_the_work_of_another_process_is_left_alone(out, dead_pid):
    kept = [
        leftover(out, os.getppid(), "partial"),
        leftover(out, dead_pid, "partial", host="another"),
        leftover(out.with_name("out2"), dead_pid, "partial"),
    ]
    artifact.check_destination(out, force=False)
    assert all(path.exists() for path in kept)


def test_an_artifact_that_was_moved_aside_when_its_process_died_comes_back(out, dead_pid):
    leftover(out, dead_pid, "replaced")
    with pytest.raises(ArtifactError, match="did not write"):
        artifact.check_destination(out, force=False)
    assert names(out) == ["half"]


def test_an_artifact_that_was_moved_aside_goes_when_the_new_one_is_in_place(out, dead_pid):
    write_artifact(out)
    leftover(out, dead_pid, "replaced")
    artifact.check_destination(out, force=True)
    assert names(out.parent) == ["out"]


def test_a_killed_process_leaves_no_output_and_the_next_one_clears_up(out):
    code = f"""
import pathlib, time
from llmopt.artifact import staged
with staged(pathlib.Path({str(out)!r}), force=False) as folder:
    (folder / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate()
    assert not out.exists()
    assert re.fullmatch(r"\.out\.llmopt-.*\.partial", names(out.parent)[0])
    write_artifact(out)
    assert names(out.parent) == ["out"]


# The manifest.


def test_a_manifest_comes_back_as_it_was_written(out):
    write_artifact(
        out,
        {"model.onnx": b"graph", "onnx/weights.data": b"\0" * 1000, "report.json": b"{}", "README.md": b"card"},
        overrides={"lm_head": "w8a16-g64-sym"},
        ignore=("model.layers.0.*",),
        seed=7,
        versions={"torch": "2.13.0"},
    )
    loaded = artifact.load_manifest(out, verify=True)
    assert loaded.files["onnx/weights.data"] == FileEntry(
        sha256="541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53", bytes=1000
    )
    assert list(loaded.files) == ["model.onnx", "onnx/weights.data"]
    assert loaded.ignore == ("model.layers.0.*",)
    assert json.loads((out / "llmopt.json").read_text()) == json.loads(json.dumps(loaded.to_json()))


def test_two_runs_write_the_same_bytes(tmp_path):
    first = write_artifact(tmp_path / "first")
    time.sleep(0.01)
    second = write_artifact(tmp_path / "second")
    assert (first / "llmopt.json").read_bytes() == (second / "llmopt.json").read_bytes()
    assert str(tmp_path) not in (first / "llmopt.json").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"source": Source(name="demo", fingerprint="0" * 64)},
        {"format": "hf"},
        {"scheme": "w8a8-channel-sym"},
        {"method": "rtn"},
        {"overrides": {"lm_head": "w8a16-g64-sym"}},
        {"ignore": ("lm_head",)},
        {"seed": 1},
        {"versions": {"torch": "2.13.0"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_changes_with_everything_that_determines_the_artifact(change):
    assert manifest(**change).key != manifest().key


def test_the_key_is_known_before_the_files_are():
    assert manifest(files={"a": FileEntry(sha256="0", bytes=1)}).key == manifest().key


def test_a_reader_passes_over_what_a_later_version_added(out):
    edit(write_artifact(out), lambda content: content | {"later": [1]})
    assert artifact.load_manifest(out).scheme == "w8a16-g64-sym"


def edit(folder, change):
    path = folder / "llmopt.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_a_missing_folder_and_a_folder_that_is_no_artifact_say_so(out):
    with pytest.raises(ArtifactError, match="no such folder"):
        artifact.load_manifest(out)
    out.mkdir()
    with pytest.raises(ArtifactError, match="not an llmopt artifact") as caught:
        artifact.load_manifest(out)
    assert "llmopt quantize" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "schema is None"),
        (b'{"schema": "llmopt.artifact/2"}', "has schema llmopt.artifact/2"),
        (b'{"schema": "llmopt.artifact/1"}', "'source' is wrong"),
        (b'{"schema": "llmopt.artifact/1", "source": {"name": 1, "fingerprint": "f"}}', "'source.name' is wrong"),
    ],
)
def test_a_broken_manifest_says_what_is_wrong_with_it(out, content, message):
    out.mkdir()
    (out / "llmopt.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        artifact.load_manifest(out)
    assert caught.value.where == str(out / "llmopt.json")


def test_missing_and_truncated_files_are_found_without_reading_them(out):
    write_artifact(out, {"model.onnx": b"graph", "weights": b"12345"})
    (out / "weights").write_bytes(b"123")
    with pytest.raises(ArtifactError, match="has 3 bytes and should have 5"):
        artifact.load_manifest(out)
    (out / "weights").unlink()
    with pytest.raises(ArtifactError, match="missing") as caught:
        artifact.load_manifest(out)
    assert caught.value.where == str(out / "weights")


def test_a_changed_file_is_found_by_its_hash(out):
    write_artifact(out, {"weights": b"12345"})
    (out / "weights").write_bytes(b"12346")
    artifact.load_manifest(out)
    with pytest.raises(ArtifactError, match="hash differs"):
        artifact.load_manifest(out, verify=True)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\..\\..\\x", "C:x", "C:\\x", "", "."])
def test_a_file_name_that_leaves_the_folder_is_refused(out, name):
    edit(write_artifact(out), lambda content: content | {"files": {name: {"sha256": "0", "bytes": 1}}})
    with pytest.raises(ArtifactError, match="outside its folder"):
        artifact.load_manifest(out)


# JSON and disk.


def test_json_keeps_the_order_of_its_keys_and_ends_with_a_newline(tmp_path):
    artifact.write_json(tmp_path / "a.json", {"z": 1, "a": "σ"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "z": 1,\n  "a": "σ"\n}\n'


def test_a_pipe_or_a_device_is_written_to_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    artifact.write_json(path, {"a": 1})
    assert os.read(reader, 100) == b'{\n  "a": 1\n}\n'
    os.close(reader)
    assert path.is_fifo()


def test_a_link_stays_one_and_what_it_names_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "far" / "a.json")
    for value in (1, 2):  # there is nothing yet, and then there is
        artifact.write_json(link, {"a": value})
        assert link.is_symlink()
        assert json.loads((tmp_path / "far" / "a.json").read_text()) == {"a": value}


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    artifact.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        artifact.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_disk_without_room_is_refused_with_both_numbers(tmp_path):
    artifact.check_free_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(ResourceError, match=r"1,000,000,000,000\.0 MB needed, [\d,.]+ MB free"):
        artifact.check_free_disk(tmp_path / "not" / "yet", 10**18)
