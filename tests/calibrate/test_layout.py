"""Configs and splits are found where the `datasets` library finds them."""

import pytest

from llmopt.calibrate.layout import read_layout
from llmopt.errors import DataError, UsageError


def header(configs: str) -> str:
    return f"---\nlicense: mit\nconfigs:\n{configs}\n---\n# A dataset\n\n---\n"


def splits(files: list[str], readme: str = "", config: str | None = None) -> dict[str, tuple[str, ...]]:
    layout = read_layout(files, readme, "owner/name")
    return dict(layout.configs[layout.choose_config(config, "owner/name")])


STATED = """\
- config_name: raw
  data_files:
  - split: test
    path: raw/test-*
  - split: train
    path: [raw/train-*, "more/**/*.parquet"]
- config_name: clean
  default: true
  data_files: clean/*.jsonl"""
STORED = [
    "raw/train-00001-of-00002.parquet",
    "raw/train-00000-of-00002.parquet",
    "raw/test-00000-of-00001.parquet",
    "raw/old/test-00000-of-00001.parquet",
    "more/a/b.parquet",
    "clean/a.jsonl",
    "clean/b.jsonl",
    "README.md",
]


def test_the_readme_says_which_files_a_split_has() -> None:
    assert splits(STORED, header(STATED), "raw") == {
        "test": ("raw/test-00000-of-00001.parquet",),
        "train": ("raw/train-00000-of-00002.parquet", "raw/train-00001-of-00002.parquet", "more/a/b.parquet"),
    }
    assert splits(STORED, header(STATED)) == {"train": ("clean/a.jsonl", "clean/b.jsonl")}


def test_a_config_may_name_a_folder_or_splits_as_a_mapping() -> None:
    readme = header('- config_name: a\n  data_dir: a\n- config_name: b\n  data_files: {dev: "b/x?.json"}')
    files = ["a/test.jsonl", "a/train.jsonl", "b/x1.json", "b/x12.json"]
    assert splits(files, readme, "a") == {"test": ("a/test.jsonl",), "train": ("a/train.jsonl",)}
    assert splits(files, readme, "b") == {"dev": ("b/x1.json",)}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("[xy].jsonl", ("x.jsonl", "y.jsonl")),
        ("[!x].jsonl", ("y.jsonl", "z.jsonl")),
        ("[x-y].jsonl", ("x.jsonl", "y.jsonl")),
        ("a[!x]b.jsonl", ()),
        ("{x,z}.jsonl", ("x.jsonl", "z.jsonl")),
        ("{a/*,z}.jsonl", ("a/b.jsonl", "z.jsonl")),
        ("**", ("a/b.jsonl", "x.jsonl", "y.jsonl", "z.jsonl")),
        ("[x.jsonl", ("[x.jsonl",)),
    ],
)
def test_patterns_mean_what_they_mean_to_a_shell(pattern: str, expected: tuple[str, ...]) -> None:
    files = ["a/b.jsonl", "x.jsonl", "y.jsonl", "z.jsonl", *(["[x.jsonl"] if pattern == "[x.jsonl" else [])]
    readme = header(f"- config_name: a\n  data_files: {{train: '{pattern}', test: z.jsonl}}")
    assert sorted(splits(files, readme).get("train", ())) == sorted(expected)


def test_a_pattern_that_is_none_is_named() -> None:
    with pytest.raises(DataError, match=r"\[z-a\]"):
        read_layout(["x.jsonl"], header("- config_name: a\n  data_files: '[z-a].jsonl'"), "owner/name")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["b.jsonl", "a.jsonl"], {"train": ("a.jsonl", "b.jsonl")}),
        (["data/odd-00000-of-00001.parquet"], {"odd": ("data/odd-00000-of-00001.parquet",)}),
        (["my_train.txt", "my_dev.txt", "other.txt"], {"train": ("my_train.txt",), "validation": ("my_dev.txt",)}),
        (["test/1.json", "training/1.json"], {"test": ("test/1.json",), "train": ("training/1.json",)}),
        (["contest.txt"], {"train": ("contest.txt",)}),
        (["a.parquet", "b.parquet", "dataset_infos.json", "notes.txt"], {"train": ("a.parquet", "b.parquet")}),
    ],
)
def test_without_a_word_of_it_names_of_files_tell(files: list[str], expected: dict[str, tuple[str, ...]]) -> None:
    assert splits(files) == expected


def test_the_conversion_of_the_hub_has_a_folder_for_each_config() -> None:
    files = ["en/train/0000.parquet", "en/train/0001.parquet", "de/partial-train/0000.parquet"]
    assert splits(files, config="en") == {"train": ("en/train/0000.parquet", "en/train/0001.parquet")}
    assert splits(files, config="de") == {"train": ("de/partial-train/0000.parquet",)}


def test_what_is_not_there_is_named_beside_what_is() -> None:
    layout = read_layout(STORED, header(STATED), "owner/name")
    with pytest.raises(UsageError, match="no config 'row'") as caught:
        layout.choose_config("row", "owner/name")
    assert caught.value.hint == "did you mean 'raw'? known here: raw, clean"
    with pytest.raises(UsageError, match="config raw has no split 'tset'") as caught:
        layout.choose_split("raw", "tset", (), "owner/name")
    assert caught.value.hint == "did you mean 'test'? known here: test, train"


def test_what_is_not_named_is_chosen_only_where_nothing_else_could_be_meant() -> None:
    layout = read_layout(STORED, header(STATED.replace("  default: true\n", "")), "owner/name")
    with pytest.raises(UsageError, match="several configs") as caught:
        layout.choose_config(None, "owner/name")
    assert "raw, clean" in str(caught.value.hint)
    assert layout.choose_split("raw", None, ("validation", "train"), "owner/name") == "train"
    assert layout.choose_split("clean", None, ("test",), "owner/name") == "train"
    with pytest.raises(UsageError, match="several splits") as caught:
        layout.choose_split("raw", None, ("validation",), "owner/name")
    assert "test, train" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("files", "readme", "what"),
    [
        (["script.py", "data.zip"], "", "no files that can be read"),
        (["a.jsonl"], header("- data_files: b.jsonl"), "no files that can be read"),
        (["a.jsonl"], "---\nconfigs: [\n---\n", "not valid YAML"),
        (["a.jsonl"], header("- data_files: 3"), "name no files: 3"),
        (["a.jsonl"], header("- data_files: [{split: test}]"), "name no files"),
        (["a.jsonl"], "---\nconfigs: all of it\n---\n", "name no files: all of it"),
    ],
)
def test_a_dataset_that_cannot_be_read_says_why(files: list[str], readme: str, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        read_layout(files, readme, "owner/name")
    assert caught.value.where == "owner/name"
