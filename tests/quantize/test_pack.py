"""Packed bytes mean to onnxruntime's kernels what the codes mean here."""

import platform

import numpy as np
import pytest
import torch

from llmopt.export.onnx.kernels import INT8_BLOCKS_OF_2_BITS
from llmopt.quantize.pack import (
    block_scales,
    block_size,
    block_zero_points,
    pack_bytes,
    pack_codes,
    unpack_bytes,
    zero_points,
)
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import parse_scheme
from llmopt.quantize.weights import QuantizedWeight
from tests.onnx_nodes import Array, relative_error, run_node

SCHEMES = [
    f"w{bits}a16-{group}-{symmetry}"
    for bits in (2, 4, 8)
    for group in ("g32", "g64", "g128", "channel")
    for symmetry in ("sym", "asym")
]
COLUMNS = [256, 80, 72, 33]  # whole blocks; blocks of 16 only; of none; an odd number
X86 = platform.machine().lower() in {"x86_64", "amd64"}


def quantized(name: str, columns: int, rows: int = 24) -> QuantizedWeight:
    """Rows off centre, so that zero points differ."""
    generator = torch.Generator().manual_seed(columns)
    weight_OI = torch.randn((rows, columns), generator=generator) + torch.linspace(-1, 1, rows)[:, None]
    return Rtn().quantize(weight_OI, parse_scheme(name))


def activations(columns: int, tokens: int = 7) -> Array:
    return np.random.default_rng(0).normal(size=(tokens, columns)).astype(np.float32)


def multiply(x: Array, weight: QuantizedWeight, accuracy_level: int) -> Array:
    inputs = [x, pack_codes(weight), block_scales(weight), block_zero_points(weight)]
    rows, columns = weight.codes_OI.shape
    size = block_size(weight)
    attributes = {"K": columns, "N": rows, "bits": weight.scheme.bits, "block_size": size}
    return run_node("MatMulNBits", inputs, **attributes, accuracy_level=accuracy_level)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", SCHEMES)
def test_matmulnbits_multiplies_by_the_dequantized_weight(name: str, columns: int) -> None:
    weight, x = quantized(name, columns), activations(columns)
    expected = x @ weight.dequantize().numpy().T
    assert relative_error(multiply(x, weight, accuracy_level=0), expected) < 1e-6
    assert relative_error(multiply(x[:1], weight, accuracy_level=0), expected[:1]) < 1e-6


def bits_have_no_int8(bits: int, size: int) -> bool:
    return bits == 2 and size not in INT8_BLOCKS_OF_2_BITS


@pytest.mark.skipif(not X86, reason="other processors' kernels round activations in blocks of their own")
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", SCHEMES)
def test_level_4_rounds_activations_to_int8_block_by_block(name: str, columns: int) -> None:
    weight, x = quantized(name, columns), activations(columns)
    size = block_size(weight)
    if bits_have_no_int8(weight.scheme.bits, size):
        assert relative_error(multiply(x, weight, accuracy_level=4), x @ weight.dequantize().numpy().T) < 1e-6
        return
    blocks_TBS = np.pad(x, ((0, 0), (0, -columns % size))).reshape(len(x), -1, size)
    steps_TB1 = np.abs(blocks_TBS).max(-1, keepdims=True) / 127
    rounded = (np.round(blocks_TBS / steps_TB1) * steps_TB1).reshape(len(x), -1)[:, :columns]
    expected = rounded @ weight.dequantize().numpy().T
    assert relative_error(multiply(x, weight, accuracy_level=4), expected) < 1e-6
    assert relative_error(multiply(x[:1], weight, accuracy_level=4), expected[:1]) < 1e-6
    assert relative_error(rounded, x) > 1e-3  # so the two levels can be told apart


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", SCHEMES)
def test_gatherblockquantized_finds_the_dequantized_rows_in_the_same_bytes(name: str, columns: int) -> None:
    weight, ids = quantized(name, columns), np.array([[3, 0, 23], [3, 17, 1]])
    codes = pack_codes(weight).reshape(24, -1)
    table = run_gather(ids, codes, weight)
    whole_blocks = -(-columns // block_size(weight)) * block_size(weight)
    assert table.shape == (2, 3, whole_blocks)
    np.testing.assert_array_equal(table[..., :columns], weight.dequantize().numpy()[ids])
    assert not table[..., columns:].any()  # padding stands for zero


def run_gather(ids: Array, codes: Array, weight: QuantizedWeight) -> Array:
    """The table is the operator's first input: `run_node` feeds it, and the ids are constant."""
    inputs = [codes, ids, block_scales(weight), block_zero_points(weight)]
    attributes = {"bits": weight.scheme.bits, "block_size": block_size(weight)}
    return run_node("GatherBlockQuantized", inputs, **attributes, gather_axis=0, quantize_axis=1)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (4, [[1, 2, 3], [15, 0, 9]], [[0x21, 0x03], [0x0F, 0x09]]),
        (2, [[1, 2, 3, 0, 1], [3, 0, 2, 1, 2]], [[0b00_11_10_01, 0b01], [0b01_10_00_11, 0b10]]),
        (8, [[1, 255]], [[1, 255]]),
    ],
)
def test_the_first_code_is_in_the_lowest_bits_and_a_byte_that_is_not_full_ends_with_zero(
    bits: int, codes: list[list[int]], packed: list[list[int]]
) -> None:
    values = np.array(codes, np.uint8)
    assert pack_bytes(values, bits).tolist() == packed
    np.testing.assert_array_equal(unpack_bytes(pack_bytes(values, bits), bits, values.shape[1]), values)


@pytest.mark.parametrize(
    ("name", "columns", "size"),
    [
        ("w4a16-g64", 72, 64),
        ("w8a16-g128", 72, 128),
        ("w4a16-channel", 256, 128),
        ("w4a16-channel", 192, 64),
        ("w4a16-channel", 96, 32),
        ("w8a16-channel", 80, 16),
        ("w8a16-channel", 72, 32),
    ],
)
def test_a_whole_row_is_cut_into_the_largest_blocks_that_fill_it(name: str, columns: int, size: int) -> None:
    assert block_size(quantized(name, columns, rows=2)) == size


@pytest.mark.parametrize("name", SCHEMES)
def test_shapes_are_those_of_the_blocks(name: str) -> None:
    weight = quantized(name, 72)
    size, bits = block_size(weight), weight.scheme.bits
    blocks = -(-72 // size)
    assert (pack_codes(weight).shape, pack_codes(weight).dtype) == ((24, blocks, size * bits // 8), np.uint8)
    assert (block_scales(weight).shape, block_scales(weight).dtype) == ((24, blocks), np.float32)
    zeros = block_zero_points(weight)
    assert (zeros is None) == weight.scheme.symmetric
    if zeros is not None:
        assert (zeros.shape, zeros.dtype) == ((24, -(-blocks * bits // 8)), np.uint8)


def test_the_zero_point_that_none_means_is_half_the_levels() -> None:
    assert (zero_points(quantized("w2a16-sym", 64)) == 2).all()
    assert (zero_points(quantized("w4a16-sym", 64)) == 8).all()
    assert (zero_points(quantized("w8a16", 64)) == 128).all()
