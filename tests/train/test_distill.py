"""The loss of a student, against torch's own and autograd."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from llmopt.train import distill
from llmopt.train.distill import NO_TARGET, distillation_loss

ROWS, VOCABULARY = 7, 11


def logits(seed):
    return 3 * torch.randn((ROWS, VOCABULARY), generator=torch.Generator().manual_seed(seed))


def by_torch(student, teacher, targets, share):
    kl = kl_div(log_softmax(student, -1), log_softmax(teacher, -1), reduction="none", log_target=True).sum(-1)
    text = cross_entropy(student, targets.clamp_min(0), reduction="none")
    return torch.where(targets == NO_TARGET, kl, (1 - share) * kl + share * text).mean()


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 2**24])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_of_the_formula(monkeypatch, chunk, share):
    monkeypatch.setattr(distill, "CHUNK_LOGITS", chunk)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(2))
    targets[-1] = NO_TARGET
    student, teacher = logits(0).requires_grad_(), logits(1)
    expected = by_torch(student, teacher, targets, share)
    (gradient,) = torch.autograd.grad(2.5 * expected, student)
    found = distillation_loss(student, teacher, targets, share)
    (2.5 * found).backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(student.grad, gradient, atol=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    student = logits(0).requires_grad_()
    loss = distillation_loss(student, logits(0), torch.full((ROWS,), NO_TARGET), 0.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert student.grad.abs().max() < 1e-7


def test_a_teacher_gets_no_gradient():
    teacher = logits(1).requires_grad_()
    distillation_loss(logits(0).requires_grad_(), teacher, torch.full((ROWS,), NO_TARGET), 0.0).backward()
    assert teacher.grad is None
