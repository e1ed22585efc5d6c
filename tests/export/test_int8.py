"""Integer products: a range for each token, exact sums, and nothing that depends on the other tokens."""

from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from llmopt.export.onnx.graph import GRAPH_FILE, Graph
from llmopt.export.onnx.int8 import int8_product, write_columns
from llmopt.model.spec import Linear
from llmopt.quantize.execute import quantized_apply
from llmopt.quantize.int8 import LARGEST_SUM
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from llmopt.quantize.weights import QuantizedWeight
from tests.onnx_nodes import Array, open_graph, relative_error

WIDTH, CHANNELS = 80, 24


def random_weight(seed: int = 0) -> QuantizedWeight:
    """Rows off centre, so that their sums count."""
    weight_OI = torch.randn((CHANNELS, WIDTH), generator=torch.Generator().manual_seed(seed))
    return Rtn().quantize(weight_OI + torch.linspace(-1, 1, CHANNELS)[:, None], parse_scheme("w8a8"))


def random_tokens(batch: int = 3, tokens: int = 5) -> Array:
    """Every token with an outlier of its own size and sign."""
    random = np.random.default_rng(0)
    x = random.normal(size=(batch, tokens, WIDTH)).astype(np.float32)
    for row, size in zip(x.reshape(-1, WIDTH), np.geomspace(1, 1e4, batch * tokens), strict=True):
        row[random.integers(WIDTH)] = size * random.choice([-1, 1])
    return x


def product_session(folder: Path, weight: QuantizedWeight) -> onnxruntime.InferenceSession:
    """y; and the codes of x, with each token's step and the code of its zero."""
    graph = Graph(folder)
    graph.input("x", TensorProto.FLOAT, ["batch", "tokens", WIDTH])
    y = int8_product(graph, "x", "up", write_columns(graph, "up", weight))
    kinds = dict.fromkeys((y, "x/step", "x/zero"), TensorProto.FLOAT)
    return open_graph(graph, kinds | {"x/codes": TensorProto.UINT8})


def reference(x: Array, weight: QuantizedWeight) -> Array:
    linear = Linear(name="up", out_features=CHANNELS, in_features=WIDTH)
    return quantized_apply({"up.weight": weight}, linear, torch.from_numpy(x)).numpy()


def test_every_token_has_256_codes_over_a_range_of_its_own(tmp_path: Path) -> None:
    x = random_tokens()
    _, step, zero, codes = product_session(tmp_path, random_weight()).run(None, {"x": x})
    x = x.reshape(-1, WIDTH)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    np.testing.assert_allclose(step, (high - low) / 255, rtol=1e-6)
    np.testing.assert_array_equal(zero, np.round(-low / step))
    assert (codes.min(-1) == 0).all()
    assert (codes.max(-1) >= 254).all()
    values = (codes.astype(np.float64) - zero) * step
    assert (np.abs(values - x) <= 0.5001 * step).all()


def test_the_product_is_that_of_the_reference_whatever_the_outliers(tmp_path: Path) -> None:
    x, weight = random_tokens(), random_weight()
    y = product_session(tmp_path, weight).run(None, {"x": x})[0]
    for actual, expected in zip(y.reshape(-1, CHANNELS), reference(x, weight).reshape(-1, CHANNELS), strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_a_token_alone_is_what_it_is_among_others(tmp_path: Path) -> None:
    x = random_tokens()
    session = product_session(tmp_path, random_weight())
    whole = session.run(None, {"x": x})
    for index, (batch, token) in enumerate(np.ndindex(3, 5)):
        alone = session.run(None, {"x": x[batch : batch + 1, token : token + 1]})
        for value, among in zip(alone, whole, strict=True):
            np.testing.assert_array_equal(value.reshape(-1), among.reshape(15, -1)[index])


@pytest.mark.parametrize("value", [0.0, 2.5, -3.0])
def test_a_token_of_equal_values_is_multiplied_by_the_sums(tmp_path: Path, value: float) -> None:
    weight, x = random_weight(), np.full((1, 2, WIDTH), value, np.float32)
    y = product_session(tmp_path, weight).run(None, {"x": x})[0]
    expected = value * weight.dequantize().sum(1).numpy()
    np.testing.assert_allclose(y, np.broadcast_to(expected, y.shape), rtol=1e-5, atol=1e-30)


def test_halves_fall_as_they_do_in_the_reference(tmp_path: Path) -> None:
    """In a symmetric row both ends lie halfway between two codes."""
    x, weight = np.tile(np.array([-127.5, 127.5, 64, 0, -0.5], np.float32), (1, 3, WIDTH // 5)), random_weight()
    y = product_session(tmp_path, weight).run(None, {"x": x})[0]
    assert relative_error(y, reference(x, weight)) < 1e-6


def test_sums_are_exact_at_the_ends_of_what_pairs_may_be(tmp_path: Path) -> None:
    """Codes of 255 against pairs that add up to 128, where a 16-bit sum just holds."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(-128, 128, (CHANNELS, WIDTH // 2), generator=generator)
    most = torch.where(first < 0, -LARGEST_SUM - first, (LARGEST_SUM - first).clamp_max(127))
    codes = (torch.stack([first, most], -1).flatten(1) + 128).to(torch.uint8)
    scales = torch.full((CHANNELS, 1), 0.01)
    weight = QuantizedWeight(scheme=parse_scheme("w8a8"), codes_OI=codes, scales_OG=scales, zero_points_OG=None)
    # Zeros and ones, whose codes are 0 and 255, and mostly ones.
    x: Array = (np.random.default_rng(2).random((2, 9, WIDTH)) < 0.8).astype(np.float32)
    y = product_session(tmp_path, weight).run(None, {"x": x})[0]
    np.testing.assert_allclose(y, x @ weight.dequantize().numpy().T, rtol=0, atol=2e-4)


def test_codes_that_could_saturate_are_not_written(tmp_path: Path) -> None:
    codes = torch.full((CHANNELS, WIDTH), 255, dtype=torch.uint8)
    scales = torch.ones((CHANNELS, 1))
    weight = QuantizedWeight(scheme=parse_scheme("w8a8"), codes_OI=codes, scales_OG=scales, zero_points_OG=None)
    graph = Graph(tmp_path)
    with closing(graph.data), pytest.raises(AssertionError, match="saturate"):
        write_columns(graph, "up", weight)


def test_codes_are_written_column_by_column(tmp_path: Path) -> None:
    weight = random_weight()
    product_session(tmp_path, weight)
    model = onnx.load(tmp_path / GRAPH_FILE)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    codes = stored["up.codes"]
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes.astype(int).T, weight.codes_OI.numpy().astype(int) - 128)
    np.testing.assert_array_equal(stored["up.scales"], weight.scales_OG[:, 0].numpy())
    np.testing.assert_allclose(stored["up.sums"][0], weight.dequantize().double().sum(1).numpy(), rtol=1e-5)


def test_products_of_one_input_share_its_codes(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    graph.input("x", TensorProto.FLOAT, ["batch", "tokens", WIDTH])
    weights = [random_weight(seed) for seed in (0, 1)]
    outputs = [
        int8_product(graph, "x", name, write_columns(graph, name, weight))
        for name, weight in zip(("gate", "up"), weights, strict=True)
    ]
    assert [node.op_type for node in graph.nodes].count("MatMulIntegerToFloat") == 2
    assert [node.op_type for node in graph.nodes].count("ReduceMax") == 1
    x = random_tokens()
    for actual, weight in zip(open_graph(graph, outputs).run(None, {"x": x}), weights, strict=True):
        assert relative_error(actual, reference(x, weight)) < 1e-5
