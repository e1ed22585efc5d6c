"""A graph under construction: tensors go to the disk at once, and what is opened is what was added."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, checker, numpy_helper

from llmopt.engine.ort import open_session
from llmopt.export.onnx.graph import ALIGNMENT, DATA_FILE, GRAPH_FILE, Graph

DTYPES = [np.float32, np.uint8, np.int8, np.int64]


def add_product(graph: Graph) -> None:
    """y = x w + 1"""
    graph.input("x", TensorProto.FLOAT, ["rows", 3])
    weight = graph.tensor("w", np.arange(6, dtype=np.float32).reshape(3, 2))
    graph.node("Add", [graph.node("MatMul", ["x", weight], "mul"), graph.constant(np.float32(1))], "add", outputs=["y"])
    graph.output("y", TensorProto.FLOAT, ["rows", 2])


def test_a_saved_graph_computes_what_was_added(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    add_product(graph)
    graph.save("1.2")
    x = np.array([[1, 2, 3], [-1, 0, 1]], np.float32)
    (y,) = open_session(tmp_path / GRAPH_FILE, tmp_path, threads=1).run(None, {"x": x})
    np.testing.assert_array_equal(y, x @ np.arange(6).reshape(3, 2) + 1)


def test_the_file_names_its_versions_and_passes_the_checker(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    add_product(graph)
    saved = graph.save("1.2")
    model = onnx.load(tmp_path / GRAPH_FILE, load_external_data=False)
    assert model == saved
    assert (model.ir_version, model.producer_name, model.producer_version) == (10, "llmopt", "1.2")
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 21, "com.microsoft": 1}
    checker.check_model(tmp_path / GRAPH_FILE, full_check=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_from_the_data_file_as_they_were(tmp_path: Path, dtype: type) -> None:
    arrays = {
        "first": np.arange(35).astype(dtype).reshape(5, 7),
        "transposed": np.arange(35).astype(dtype).reshape(5, 7).T,
        "empty": np.zeros((0, 4), dtype),
        "scalar": np.array(3, dtype),
        "last": np.arange(64).astype(dtype),
    }
    graph = Graph(tmp_path)
    for name, array in arrays.items():
        assert graph.tensor(name, array) == name
    graph.save("0")
    model = onnx.load(tmp_path / GRAPH_FILE)
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_tensors_begin_on_multiples_of_64_bytes(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    for length in (1, 63, 64, 65):
        graph.tensor(f"of {length}", np.full(length, length, np.uint8))
    graph.save("0")
    places = {name: {item.key: item.value for item in tensor.external_data} for name, tensor in graph.tensors.items()}
    assert [int(place["offset"]) for place in places.values()] == [0, 64, 128, 192]
    assert [int(place["length"]) for place in places.values()] == [1, 63, 64, 65]
    assert {place["location"] for place in places.values()} == {DATA_FILE}
    assert (tmp_path / DATA_FILE).stat().st_size == 192 + 65
    assert ALIGNMENT == 64


def test_bytes_are_on_the_disk_as_soon_as_a_tensor_is_added(tmp_path: Path) -> None:
    """Not in memory: a model's weights pass through one by one."""
    graph = Graph(tmp_path)
    graph.tensor("large", np.zeros(1 << 20, np.uint8))
    graph.tensor("larger", np.zeros(1 << 20, np.uint8))
    assert (tmp_path / DATA_FILE).stat().st_size >= 1 << 20
    assert sum(tensor.ByteSize() for tensor in graph.tensors.values()) < 1000
    graph.data.close()


def test_an_alias_is_the_same_bytes_in_another_shape(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    graph.tensor("filler", np.zeros(100, np.uint8))
    graph.tensor("table", np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    graph.alias("flat", "table", [2, 12])
    graph.save("0")
    assert (tmp_path / DATA_FILE).stat().st_size == 128 + 24
    found = {tensor.name: tensor for tensor in onnx.load(tmp_path / GRAPH_FILE).graph.initializer}
    np.testing.assert_array_equal(numpy_helper.to_array(found["flat"]), np.arange(24).reshape(2, 12))


def test_equal_constants_are_one_and_different_ones_are_not(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    names = [
        graph.constant(value)
        for value in (np.int64(1), np.array(1), np.array([1]), np.int32(1), np.float32(1), np.float32(1 + 2**-23))
    ]
    assert names[0] == names[1]
    assert len(set(names)) == 5
    for name, value in zip(names[1:], (1, [1], 1, 1, 1 + 2**-23), strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(graph.tensors[name]), value)
    graph.data.close()


def test_a_name_is_given_once(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    graph.tensor("w", np.zeros(2, np.float32))
    with pytest.raises(AssertionError):
        graph.tensor("w", np.zeros(2, np.float32))
    graph.data.close()


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    graph.data.close()
    graph.data.close()
    assert graph.data.file.closed
