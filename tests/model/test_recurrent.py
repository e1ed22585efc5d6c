"""LSTM layers: what torch's own compute, in parts as well."""

import pytest
import torch

from llmopt.errors import UsageError
from llmopt.model.recurrent import RecurrentSpec, recurrent_spec

SPEC = RecurrentSpec(layers=2, width=12, vocab_size=31)


def torchs_own(layer):
    own = torch.nn.LSTM(12, 12, batch_first=True).requires_grad_(False)
    own.weight_ih_l0.copy_(layer._inputs_GH)
    own.weight_hh_l0.copy_(layer._outputs_GH)
    own.bias_ih_l0.copy_(layer._bias_G)
    own.bias_hh_l0.zero_()
    return own


def test_a_layer_computes_what_torchs_own_does():
    layer = SPEC.layer(0)
    x_BTH = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(5))
    found_BTH, (output_BH, cell_BH) = layer(x_BTH, None)
    expected_BTH, (expected_output, expected_cell) = torchs_own(layer)(x_BTH)
    torch.testing.assert_close(found_BTH, expected_BTH)
    torch.testing.assert_close(output_BH, expected_output[0])
    torch.testing.assert_close(cell_BH, expected_cell[0])


def test_a_layer_goes_on_from_where_it_was():
    layer = SPEC.layer(1)
    x_BTH = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(5))
    first_BTH, carried = layer(x_BTH[:, :3], None)
    rest_BTH, _ = layer(x_BTH[:, 3:], carried)
    torch.testing.assert_close(torch.cat([first_BTH, rest_BTH], 1), layer(x_BTH, None)[0])


def test_layers_differ_and_each_is_the_same_whenever_it_is_drawn():
    one, again, other = SPEC.layer(0), SPEC.layer(0), SPEC.layer(1)
    x_BTH = torch.ones(1, 2, 12)
    assert torch.equal(one(x_BTH, None)[0], again(x_BTH, None)[0])
    assert not torch.equal(one(x_BTH, None)[0], other(x_BTH, None)[0])
    assert one.nbytes == SPEC.layer_bytes


def test_a_name_says_what_a_model_is():
    assert recurrent_spec("lstm:12x2048") == RecurrentSpec(layers=12, width=2048)
    assert recurrent_spec("lstm:2x12,vocab=31") == SPEC
    with pytest.raises(UsageError, match="'lstm:12' is no recurrent model"):
        recurrent_spec("lstm:12")
