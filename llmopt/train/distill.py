"""How far a student's distribution of the next token is from its teacher's, over the full vocabulary."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_LOGITS = 2**24  # of a few temporaries at a time
NO_TARGET = -1


def distillation_loss(student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, cross_entropy: float) -> Tensor:
    """(1 - c) KL(teacher ‖ student) + c · cross entropy of the text, in nats, the mean over tokens; c from 0 to 1.

    Hinton et al. 2015, arXiv 1503.02531, at temperature 1. A token whose target is `NO_TARGET` has the first term only.
    Differentiable by the student's logits; the gradient is made along with the loss, and is all that is kept of it.
    """
    loss: Tensor = _Distilled.apply(student_NV, teacher_NV, targets_N, cross_entropy)  # type: ignore[no-untyped-call]
    return loss


class _Distilled(torch.autograd.Function):
    """The gradient by logits is softmax(student) less the mixture of teacher and text."""

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, share: float) -> Tensor:
        rows, vocabulary = student_NV.shape
        step = max(1, CHUNK_LOGITS // vocabulary)
        gradient_NV = torch.empty((rows, vocabulary))
        loss = torch.zeros((), dtype=torch.float64)
        for start in range(0, rows, step):
            piece = slice(start, start + step)
            told = _piece(student_NV[piece], teacher_NV[piece], targets_N[piece], share, gradient_NV[piece])
            loss += told.sum(dtype=torch.float64)
        ctx.save_for_backward(gradient_NV.div_(rows))
        return (loss / rows).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * gradients[0], None, None, None


def _piece(student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, share: float, gradient_NV: Tensor) -> Tensor:
    """The loss of each token; the gradient goes where it is to be."""
    log_student_NV = functional.log_softmax(student_NV.float(), -1)
    log_teacher_NV = functional.log_softmax(teacher_NV.float(), -1)
    teacher_NV = log_teacher_NV.exp()
    share_N = torch.where(targets_N == NO_TARGET, 0.0, share)
    told_N1 = targets_N.clamp_min(0)[:, None]
    torch.exp(log_student_NV, out=gradient_NV)
    gradient_NV.sub_(teacher_NV * (1 - share_N)[:, None]).scatter_add_(1, told_N1, -share_N[:, None])
    kl_N = log_teacher_NV.sub_(log_student_NV).mul_(teacher_NV).sum(-1)
    return kl_N * (1 - share_N) - share_N * log_student_NV.gather(1, told_N1)[:, 0]
