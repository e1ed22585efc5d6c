"""Costs counted by hand on a small model, and held against what is known of large ones."""

import time
from typing import Any

import pytest

from llmopt.errors import UnsupportedError
from llmopt.model import cost, parallel, storage
from llmopt.model.families import spec_from_config
from llmopt.model.spec import ModelSpec
from llmopt.quantize.scheme import Scheme, parse_scheme

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}
LLAMA_405B = {
    **SMALL,
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
ATTENTION = 8 * 8 + 2 * 4 * 8 + 8 * 8  # q, k and v, output
MLP = 3 * 8 * 12


def spec_of(**changes: Any) -> ModelSpec:
    return spec_from_config({**SMALL, **changes})


def everywhere(spec: ModelSpec, scheme: Scheme) -> dict[str, Scheme | None]:
    return dict.fromkeys([spec.embedding.name, *(linear.name for linear in spec.linears())], scheme)


def windowed(window: int) -> ModelSpec:
    """The second of two blocks has a window."""
    return spec_of(model_type="qwen2", use_sliding_window=True, sliding_window=window, max_window_layers=1)


def parameters(spec: ModelSpec) -> dict[str, int]:
    return {part.name: part.parameters for part in cost.parts(spec)}


def test_parameters_by_part() -> None:
    expected = {"embedding": 800, "attention": 2 * ATTENTION, "mlp": 2 * MLP, "norms": 5 * 8, "head": 800}
    assert parameters(spec_of()) == expected


def test_a_tied_head_has_no_parameters_of_its_own() -> None:
    assert parameters(spec_of(tie_word_embeddings=True))["head"] == 0


def test_the_parts_add_up_to_the_whole() -> None:
    spec = windowed(8)
    assert sum(parameters(spec).values()) == sum(tensor.count for tensor in spec.tensors())


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_bytes_are_those_of_the_dtype_in_the_config(dtype: str, size: int) -> None:
    for part in cost.parts(spec_of(dtype=dtype)):
        assert part.size_bytes == part.parameters * size


def test_a_dtype_without_a_known_size_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="float8_e4m3fn"):
        cost.parts(spec_of(dtype="float8_e4m3fn"))


def test_decoding_multiplies_by_every_weight_and_attends_to_the_context() -> None:
    work = cost.decode(spec_of(), context=10)
    assert work.tokens == 1
    assert work.flops == 2 * (2 * (ATTENTION + MLP) + 800) + 2 * 4 * 8 * 10


def test_prefilling_attends_causally_and_computes_logits_once() -> None:
    work = cost.prefill(spec_of(), length=10)
    seen = sum(range(1, 11))
    assert work.flops == 10 * 2 * 2 * (ATTENTION + MLP) + 2 * 4 * 8 * seen + 2 * 800
    assert work.flops_per_token == work.flops / 10


def test_prefilling_one_token_is_decoding_behind_an_empty_cache() -> None:
    assert cost.prefill(spec_of(), 1) == cost.decode(spec_of(), 1)


def test_a_window_bounds_what_a_token_sees() -> None:
    full, sliding = spec_of(model_type="qwen2"), windowed(4)
    saved = sum(max(0, seen - 4) for seen in range(1, 11))
    assert cost.prefill(full, 10).flops - cost.prefill(sliding, 10).flops == 4 * 8 * saved
    assert cost.decode(full, 10).flops - cost.decode(sliding, 10).flops == 4 * 8 * 6


def test_decoding_reads_weights_once_and_one_row_of_the_table() -> None:
    work = cost.decode(spec_of(), context=10)
    assert work.weight_bytes == 2 * (2 * (ATTENTION + MLP) + 5 * 8 + 800 + 8)
    assert work.kv_bytes == 10 * cost.kv_bytes_per_token(spec_of())
    assert work.bytes_per_token == work.weight_bytes + work.kv_bytes


def test_a_tied_head_is_read_like_any_other() -> None:
    assert cost.decode(spec_of(tie_word_embeddings=True), 1) == cost.decode(spec_of(), 1)


def test_the_cache_holds_keys_and_values_of_every_block() -> None:
    assert cost.kv_bytes_per_token(spec_of()) == 2 * 2 * 4 * 2
    assert cost.kv_bytes_at(spec_of(), 10) == 10 * 2 * 2 * 4 * 2


def test_a_window_bounds_the_cache_of_its_block() -> None:
    assert cost.kv_bytes_at(windowed(4), 10) == (10 + 4) * 2 * 4 * 2


def test_legal_degrees_divide_heads_key_value_heads_and_channels() -> None:
    legal = [entry.degree for entry in parallel.tensor_parallel_degrees(spec_of()) if entry.legal]
    assert legal == [1, 2]


@pytest.mark.parametrize(
    ("degree", "obstacle"),
    [
        (3, "4 attention heads do not divide by 3"),
        (4, "2 key-value heads do not divide by 4"),
    ],
)
def test_an_illegal_degree_says_what_is_in_the_way(degree: int, obstacle: str) -> None:
    assert parallel.tensor_parallel(spec_of(), degree).obstacle == obstacle


def test_channels_of_the_mlp_can_be_in_the_way() -> None:
    spec = spec_of(num_key_value_heads=4, intermediate_size=10)
    assert parallel.tensor_parallel(spec, 4).obstacle == "10 MLP channels do not divide by 4"


def test_linears_group_by_their_place_in_the_block() -> None:
    table, q_proj, *_, head = storage.quantizable(spec_of())
    assert (table.pattern, table.kind, table.count) == ("model.embed_tokens", "embedding", 1)
    assert (q_proj.pattern, q_proj.kind, q_proj.count) == ("model.layers.*.self_attn.q_proj", "linear", 2)
    assert (head.pattern, head.count, head.tied) == ("lm_head", 1, False)
    assert sum(group.parameters for group in storage.quantizable(spec_of())) == 2 * (ATTENTION + MLP) + 2 * 800


def test_a_tied_head_is_listed_and_stores_nothing() -> None:
    head = storage.quantizable(spec_of(tie_word_embeddings=True))[-1]
    assert (head.pattern, head.tied, head.parameters) == ("lm_head", True, 0)


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        ("w8a16-g32-sym", 5 * (64 + 2 * 2)),
        ("w4a16-g32-asym", 5 * (32 + 2 * 2 + 1)),
        ("w4a16-g64-sym", 5 * (32 + 2)),  # the last group is padded
        ("w8a16-channel-sym", 5 * (48 + 3 * 2)),  # the scale of a row, once for each block of 16
        ("w8a8", 5 * (48 + 4 + 4)),  # a scale and a sum for each row
    ],
)
def test_a_stored_weight_has_codes_scales_and_zero_points(scheme: str, size: int) -> None:
    assert storage.stored_bytes(5, 48, parse_scheme(scheme)) == size


def test_zero_points_of_4_bits_fill_whole_bytes_in_each_row() -> None:
    assert storage.stored_bytes(5, 96, parse_scheme("w4a16-g32-asym")) == 5 * (48 + 3 * 2 + 2)


def test_a_quantized_model_keeps_norms_and_rotary_tables_in_float32() -> None:
    spec, scheme = spec_of(tie_word_embeddings=True), parse_scheme("w8a8")
    weights = sum(
        storage.stored_bytes(linear.out_features, linear.in_features, scheme)
        for block in spec.blocks
        for linear in block.linears()
    )
    table = storage.stored_bytes(100, 8, scheme)
    assert storage.quantized_bytes(spec, everywhere(spec, scheme)) == weights + table + 4 * (5 * 8 + 64 * 2)


def test_an_untied_head_is_stored_beside_the_table() -> None:
    scheme = parse_scheme("w4a16")
    specs = [spec_of(tie_word_embeddings=tied) for tied in (True, False)]
    tied, untied = (storage.quantized_bytes(spec, everywhere(spec, scheme)) for spec in specs)
    assert untied - tied == storage.stored_bytes(100, 8, scheme)


def test_each_weight_is_stored_on_its_own_grid_or_in_float32() -> None:
    spec, scheme = spec_of(tie_word_embeddings=True), parse_scheme("w4a16")
    whole = everywhere(spec, scheme)
    table, tail = storage.stored_bytes(100, 8, scheme), storage.quantized_bytes(spec, whole)
    eight = parse_scheme("w8a16")
    finer = storage.quantized_bytes(spec, whole | {"model.embed_tokens": eight, "lm_head": eight})
    assert finer - tail == storage.stored_bytes(100, 8, eight) - table
    left_alone = storage.quantized_bytes(spec, whole | {"model.embed_tokens": None, "lm_head": None})
    assert left_alone - tail == 4 * 100 * 8 - table


def test_a_405b_model_answers_in_under_a_second() -> None:
    start = time.perf_counter()
    spec = spec_from_config(LLAMA_405B)
    assert sum(parameters(spec).values()) == 405_853_388_800
    multiplied = 405_853_388_800 - 128256 * 16384 - 253 * 16384  # all but the token table and the norms
    assert cost.decode(spec, 1000).flops == 2 * multiplied + 126 * 4 * 16384 * 1000
    assert cost.kv_bytes_per_token(spec) == 126 * 2 * 8 * 128 * 2
    assert [entry.degree for entry in parallel.tensor_parallel_degrees(spec) if entry.legal] == [1, 2, 4, 8]
    assert len(storage.quantizable(spec)) == 9
    assert time.perf_counter() - start < 1.0
