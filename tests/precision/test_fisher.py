"""The information of a head, against derivatives; and labels that are drawn as often as they are likely."""

import pytest
import torch

from llmopt.precision.fisher import Rows, add_information, draw_labels, head_gradient, predicted_loss

TOKENS, WIDTH, VOCABULARY = 6, 5, 11


@pytest.fixture
def head():
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(TOKENS, WIDTH, generator=generator)
    return x_TH, torch.randn(VOCABULARY, WIDTH, generator=generator), torch.randn(VOCABULARY, generator=generator)


def in_chunks(weight_VH, bias_V, step=4):
    for start in range(0, len(weight_VH), step):
        yield Rows(start, weight_VH[start : start + step], None if bias_V is None else bias_V[start : start + step])


def log_p(x_TH, weight_VH, bias_V):
    return torch.nn.functional.linear(x_TH, weight_VH, bias_V).log_softmax(-1)


def test_labels_are_drawn_as_often_as_they_are_likely(head):
    x_TH, weight_VH, bias_V = head
    draws = 20_000
    labels = draw_labels(x_TH[:1].expand(draws, -1), in_chunks(weight_VH, bias_V), torch.Generator().manual_seed(1))
    seen_V = torch.bincount(labels.label_T, minlength=VOCABULARY) / draws
    p_V = log_p(x_TH[:1], weight_VH, bias_V)[0].exp()
    assert torch.all((seen_V - p_V).abs() <= 4 * (p_V * (1 - p_V) / draws).sqrt() + 1e-9)
    logits = torch.nn.functional.linear(x_TH[0], weight_VH, bias_V)
    assert float(labels.log_sum_T[0]) == pytest.approx(float(logits.logsumexp(0)), rel=1e-6)


def test_the_gradient_and_the_information_of_a_head_are_those_of_autograd(head):
    x_TH, weight_VH, bias_V = head
    labels = draw_labels(x_TH, in_chunks(weight_VH, bias_V), torch.Generator().manual_seed(2))
    parts = list(head_gradient(x_TH, labels, in_chunks(weight_VH, bias_V)))
    leaf = x_TH.clone().requires_grad_()
    log_p(leaf, weight_VH, bias_V)[torch.arange(TOKENS), labels.label_T].sum().backward()
    torch.testing.assert_close(sum(gradient for _, gradient, _ in parts), leaf.grad)
    # E_y[(∂ log p(y) / ∂w)²], summed over every label that there is.
    expected_VH = torch.zeros_like(weight_VH)
    for token in range(TOKENS):
        for label in range(VOCABULARY):
            weight = weight_VH.clone().requires_grad_()
            value = log_p(x_TH[token], weight, bias_V)[label]
            value.backward()
            expected_VH += value.detach().exp() * weight.grad.square() / TOKENS
    torch.testing.assert_close(torch.cat([information for _, _, information in parts]), expected_VH)


def test_the_predicted_loss_of_small_errors_in_a_head_is_its_kl_divergence(head):
    x_TH, weight_VH, _ = head
    labels = draw_labels(x_TH, in_chunks(weight_VH, None), torch.Generator().manual_seed(3))
    information_VH = torch.cat([part for _, _, part in head_gradient(x_TH, labels, in_chunks(weight_VH, None))])
    generator = torch.Generator().manual_seed(4)
    errors = [torch.randn(VOCABULARY, WIDTH, generator=generator) * 1e-2 for _ in range(400)]
    expected = sum(predicted_loss(information_VH, error) for error in errors) / len(errors)
    before_TV = log_p(x_TH, weight_VH, None)
    measured = [
        float((before_TV.exp() * (before_TV - log_p(x_TH, weight_VH + error, None))).sum(-1).mean()) for error in errors
    ]
    assert sum(measured) / len(measured) == pytest.approx(expected, rel=0.1)


def test_information_is_the_squared_derivative_by_a_weight_window_by_window():
    generator = torch.Generator().manual_seed(6)
    inputs_BTI, weight_OI = torch.randn(2, 7, 3, generator=generator), torch.randn(4, 3, generator=generator)
    found_OI, expected_OI = torch.zeros(4, 3), torch.zeros(4, 3)
    for inputs_TI in inputs_BTI:
        leaf_OI = weight_OI.clone().requires_grad_()
        outputs_TO = inputs_TI @ leaf_OI.T
        outputs_TO.retain_grad()
        outputs_TO.sin().sum().backward()
        add_information(found_OI, inputs_TI, outputs_TO.grad)
        expected_OI += leaf_OI.grad.square()
    torch.testing.assert_close(found_OI, expected_OI)
    assert predicted_loss(found_OI, torch.full((4, 3), 2.0)) == pytest.approx(float(2 * expected_OI.sum()), rel=1e-5)
