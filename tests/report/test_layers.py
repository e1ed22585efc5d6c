import pytest

from llmopt.report.layers import layer_rows
from llmopt.report.results import LayerResult


def layer(name, *, scheme="w8a16-g64-sym", reason=None, error=0.01):
    return LayerResult(name=name, scheme=scheme, method="rtn", reason=reason, relative_error=error)


def test_equal_blocks_share_a_row_and_their_errors_are_a_range():
    layers = [
        layer(f"model.layers.{index}.mlp.{part}", error=0.07 + index / 1000)
        for index in range(30)
        for part in ("up_proj", "down_proj")
    ]
    assert layer_rows(layers) == [
        ("model.layers.{0..29}.mlp.up_proj", "w8a16-g64-sym", "rtn", "0.0700 – 0.0990", ""),
        ("model.layers.{0..29}.mlp.down_proj", "w8a16-g64-sym", "rtn", "0.0700 – 0.0990", ""),
    ]


def test_a_block_that_got_something_else_has_its_own_row():
    layers = [layer(f"h.{index}.up", scheme="w4a16-g32-asym" if index == 4 else "w8a16-g64-sym") for index in range(7)]
    assert [row[:2] for row in layer_rows(layers)] == [
        ("h.{0..3,5..6}.up", "w8a16-g64-sym"),
        ("h.4.up", "w4a16-g32-asym"),
    ]


def test_reasons_keep_layers_apart():
    layers = [layer("h.0.up"), layer("h.1.up", scheme=None, reason="matches --ignore", error=None)]
    assert layer_rows(layers)[1] == ("h.1.up", "—", "rtn", "—", "matches --ignore")


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "h.0.up", "layers.0"])
def test_a_layer_alone_keeps_its_name(name):
    assert layer_rows([layer(name)])[0][0] == name


def test_only_the_block_number_is_folded():
    layers = [layer(f"h.{block}.experts.{expert}.up") for block in range(3) for expert in range(2)]
    assert [row[0] for row in layer_rows(layers)] == ["h.{0..2}.experts.0.up", "h.{0..2}.experts.1.up"]


def test_equal_errors_are_one_number():
    assert layer_rows([layer("h.0.up"), layer("h.1.up")])[0][3] == "0.0100"


def test_no_layers_are_no_rows():
    assert layer_rows([]) == []
