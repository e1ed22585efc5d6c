"""An export that computes something else than the quantized model does not pass; one that does, does."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from llmopt.errors import VerificationError
from llmopt.export.onnx.graph import DATA_FILE, GRAPH_FILE
from llmopt.pipeline.verify import Verification, agree, verify
from llmopt.progress import Silent
from tests.decoders import write_decoder
from tests.families import CASES, random_weights, spec_of
from tests.onnx_nodes import long_way

WINDOWS = [np.random.default_rng(seed).integers(0, 97, 20) for seed in (0, 1)]
UP = "model.layers.1.mlp.up_proj"
GATE_UP = "model.layers.1.mlp.gate_up_proj"  # where only weights are rounded
Damage = Callable[[np.ndarray], None]


def verified(folder: Path, scheme: str | None, spoil: Callable[[Path], None] = lambda folder: None) -> Verification:
    """Write a decoder, spoil it, and hold it against its references."""
    spec = spec_of(CASES["mistral"])
    references = write_decoder(folder, spec, random_weights(spec), lambda name: scheme, WINDOWS)
    spoil(folder)
    rounded = references.rounded if scheme == "w8a8" else None
    return verify(folder, references.exact, rounded, threads=1, progress=Silent())


def change_tensor(folder: Path, name: str, change: Damage) -> None:
    graph = onnx.load(folder / GRAPH_FILE, load_external_data=False).graph
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
    place = {item.key: item.value for item in tensor.external_data}
    array = np.memmap(
        folder / DATA_FILE,
        onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type),
        mode="r+",
        offset=int(place["offset"]),
        shape=tuple(tensor.dims),
    )
    before = array.copy()
    change(array)
    assert (array != before).any()
    array.flush()


@pytest.mark.parametrize("scheme", [None, "w8a16", "w4a16"])
def test_an_export_in_float32_agrees_to_rounding(tmp_path: Path, scheme: str | None) -> None:
    found = verified(tmp_path, scheme)
    assert found.exact.relative_error < 5e-6
    assert found.exact.top1_agreement == 1.0
    assert 0 <= found.exact.kl_divergence < 1e-8
    assert found.exact.tokens == found.shipped.tokens == 40
    assert found.rounded is None


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
def test_what_rounding_activations_costs_is_told(tmp_path: Path, scheme: str) -> None:
    """Level 4 rounds them to int8, block by block."""
    found = verified(tmp_path, scheme)
    assert 1e-3 < found.shipped.relative_error < 0.05
    assert 1e-7 < found.shipped.kl_divergence < 0.05


def test_integer_products_err_as_rounding_in_torch_does(tmp_path: Path) -> None:
    found = verified(tmp_path, "w8a8")
    assert found.exact.relative_error < 2e-5
    assert found.rounded is not None
    assert 0.5 < found.shipped.relative_error / found.rounded.relative_error < 2
    assert found.rounded.relative_error > 1e-3


def flip(array: np.ndarray) -> None:
    """The highest bit of one byte; of a float, its sign."""
    array.view(np.uint8).reshape(-1)[7] ^= 0x80


def swap(array: np.ndarray) -> None:
    """Two neighbours, where they differ."""
    flat = array.reshape(-1)
    first = int(np.flatnonzero(flat[:-1] != flat[1:])[0])
    flat[[first, first + 1]] = flat[[first + 1, first]]


def shift(array: np.ndarray) -> None:
    """Every value where its neighbour was."""
    array[:] = np.roll(array, 1, axis=-1)


DAMAGES = [
    ("w8a16", f"{GATE_UP}.codes", flip),
    ("w8a16", f"{GATE_UP}.scales", swap),
    ("w8a16", f"{GATE_UP}.codes", shift),
    ("w4a16", f"{GATE_UP}.codes", flip),
    ("w4a16", f"{GATE_UP}.zero_points", flip),
    ("w4a16", f"{GATE_UP}.scales", swap),
    ("w8a8", f"{UP}.codes", flip),
    ("w8a8", f"{UP}.scales", swap),
    ("w8a8", f"{UP}.sums", swap),
    (None, f"{UP}.weight", flip),
    ("w4a16", "model.layers.2.input_layernorm.weight", swap),
    ("w4a16", "rotary.0.sin", shift),
]


@pytest.mark.parametrize(
    ("scheme", "name", "damage"),
    DAMAGES,
    ids=[f"{scheme}: {damage.__name__} {name}" for scheme, name, damage in DAMAGES],
)
def test_an_export_with_other_numbers_is_refused(tmp_path: Path, scheme: str, name: str, damage: Damage) -> None:
    with pytest.raises(VerificationError, match="logits differ from the quantized model's") as caught:
        verified(tmp_path, scheme, lambda folder: change_tensor(folder, name, damage))
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == [GRAPH_FILE, DATA_FILE]


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    def to_nan(array: np.ndarray) -> None:
        array[0, 0] = np.nan

    with pytest.raises(VerificationError, match="nan"):
        verified(tmp_path, "w8a16", lambda folder: change_tensor(folder, f"{GATE_UP}.scales", to_nan))


def test_integers_that_are_off_are_refused_though_the_numbers_are_right(tmp_path: Path) -> None:
    """Held in float32 alone, the graph would pass: there activations have no codes."""

    def shift_codes(folder: Path) -> None:
        model = long_way(folder)
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(7, np.uint8), "seven"))
        (node,) = (node for node in model.graph.node if node.name == f"{UP}/integers")
        node.input[4] = "seven"  # what stands for 0 in the codes of the activations
        (folder / GRAPH_FILE).write_bytes(model.SerializeToString())

    with pytest.raises(VerificationError, match="with integer products"):
        verified(tmp_path, "w8a8", shift_codes)


def test_a_way_that_tokens_take_alone_is_held_against_the_model_too(tmp_path: Path) -> None:
    def multiply_others(folder: Path) -> None:
        model = onnx.load(folder / GRAPH_FILE, load_external_data=False)
        (either,) = (node for node in model.graph.node if f"{UP}/output" in node.output)
        (alone,) = (item.g for item in either.attribute if item.name == "then_branch")
        gate, up = alone.node
        gate.input[1:], up.input[1:] = up.input[1:], gate.input[1:]
        (folder / GRAPH_FILE).write_bytes(model.SerializeToString())

    with pytest.raises(VerificationError, match="one token at a time"):
        verified(tmp_path, "w8a8", multiply_others)


def test_nothing_stays_beside_the_export(tmp_path: Path) -> None:
    verified(tmp_path, "w8a8")
    assert sorted(path.name for path in tmp_path.iterdir()) == [GRAPH_FILE, DATA_FILE]


def test_agreement_is_counted_over_all_windows() -> None:
    expected = np.array([[0.0, 3.0, 4.0], [5.0, 0.0, 0.0]], np.float32)
    actual = np.array([[0.0, 4.0, 3.0], [5.0, 0.0, 0.0]], np.float32)
    found = agree([(expected, actual), (expected, expected)])
    assert found.relative_error == pytest.approx((2 / 100) ** 0.5)
    assert found.top1_agreement == 0.75
    assert found.tokens == 4
    p, q = (np.exp(row) / np.exp(row).sum() for row in (expected[0].astype(float), actual[0].astype(float)))
    assert found.kl_divergence == pytest.approx((p * np.log(p / q)).sum() / 4, rel=1e-5)


def test_equal_logits_agree_exactly() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    found = agree([(logits, logits)])
    assert (found.relative_error, found.top1_agreement, found.kl_divergence) == (0.0, 1.0, 0.0)


def test_a_model_that_says_nothing_can_be_held_against_itself() -> None:
    """Logits of 0, from a head of zeros: there is no norm to divide by."""
    zeros = np.zeros((5, 7), np.float32)
    assert agree([(zeros, zeros)]).relative_error == 0.0
    assert agree([(zeros, zeros + 1)]).relative_error > 1
