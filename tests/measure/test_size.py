import pytest

from llmopt.measure.size import compare_sizes, model_bytes


def folder(root, name, **sizes):
    (root / name).mkdir()
    for file, size in sizes.items():
        (root / name / file.replace("__", ".")).write_bytes(b"0" * size)
    return root / name


def test_graph_and_weights_count_and_the_tokenizer_does_not(tmp_path):
    assert model_bytes(folder(tmp_path, "a", model__onnx=10, model__onnx__data=300, tokenizer__json=999)) == 310


def test_all_shards_count(tmp_path):
    path = folder(tmp_path, "a", m1__safetensors=5, m2__safetensors=6, config__json=9)
    assert model_bytes(path) == 11


def test_an_export_beside_its_source_is_not_both(tmp_path):
    assert model_bytes(folder(tmp_path, "a", model__onnx=10, model__safetensors=300)) == 10


def test_a_single_file_is_its_own_size(tmp_path):
    assert model_bytes(folder(tmp_path, "a", m__gguf=7) / "m.gguf") == 7


def test_a_folder_without_a_model_has_no_size(tmp_path):
    assert model_bytes(folder(tmp_path, "a", tokenizer__json=9)) is None


def test_the_change_is_exact_and_has_no_interval(tmp_path):
    outcome = compare_sizes(folder(tmp_path, "a", m__onnx=400), [folder(tmp_path, "b", m__onnx=100)])
    (side,) = outcome.candidates
    assert outcome.baseline.metrics["size_bytes"].value == 400
    assert side.deltas["size_bytes"].relative == pytest.approx(-0.75)
    assert (side.deltas["size_bytes"].low, side.metrics["size_bytes"].low) == (None, None)


def test_without_a_baseline_on_disk_there_is_no_change(tmp_path):
    (side,) = compare_sizes(None, [folder(tmp_path, "b", m__onnx=100)]).candidates
    assert side.metrics["size_bytes"].value == 100
    assert side.deltas == {}
