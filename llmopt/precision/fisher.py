"""How much of a model's distribution an error in its weights costs, to second order.

With p the float model's distribution of the next token and q that of the model with errors,

    KL(p ‖ q)  ≈  ½ δᵀ F δ,    F = E[∇ log p(y) ∇ log p(y)ᵀ],  y drawn from p

where δ is the change of the weights and F the Fisher information (Martens 2014, "New insights and perspectives on the
natural gradient method", arXiv 1412.1193, sections 5 and 9). Labels are drawn from the model: with those of the text,
F would be another matrix. A linear's weight acts at every token, and what its error ΔW adds to log p(y) there is
gᵀ ΔW x, with x its input and g the gradient by its output. So a token's KL is ½ E[(Σ gᵀ ΔW x)²], of which the squares
are kept and what should vanish on average is left out:

- products of different tokens (Eschenhagen et al. 2023, "Kronecker-factored approximate curvature for modern neural
  network architectures", arXiv 2311.00636, call that "expand");
- products of different outputs, whose rounding errors are not correlated. They would only add noise.

Inputs and gradients stay together. To average each by itself, as a Kronecker product does, would say that they are
independent, and a token with huge inputs is often one that nobody attends to.

At the head all labels are summed over, instead of one drawn, because all of their probabilities are there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def linear_loss(inputs_TI: Tensor, gradients_TO: Tensor, error_OI: Tensor) -> float:
    """Nats a token: ½ mean Σ_o (g_o ΔW_o x)², the mean over tokens."""
    return lookup_loss(inputs_TI @ error_OI.T, gradients_TO)


def lookup_loss(errors_TO: Tensor, gradients_TO: Tensor) -> float:
    """The same where the errors of the outputs are known: those of rows that are looked up, for each token."""
    return float((errors_TO * gradients_TO).square_().sum(-1).mean()) / 2


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a head, from `first` on: its weight, [rows, H], its bias, and the errors of each candidate."""

    first: int
    weight_RH: Tensor
    bias_R: Tensor | None

    def logits(self, x_TH: Tensor) -> Tensor:
        """[T, rows]"""
        return torch.nn.functional.linear(x_TH, self.weight_RH, self.bias_R)


@dataclass(frozen=True, slots=True)
class HeadLabels:
    """What the distribution is made of: log Σ exp of each token's logits, and a label that was drawn from it, [T]."""

    log_sum_T: Tensor
    label_T: Tensor


def draw_labels(x_TH: Tensor, rows: Iterable[Rows], generator: torch.Generator) -> HeadLabels:
    """Draw a label for each token from the softmax of its logits, some rows of the head at a time.

    The largest of logits with Gumbel noise on them is such a draw.
    """
    log_sum_T = torch.full((len(x_TH),), -torch.inf)
    best_T, label_T = log_sum_T.clone(), torch.zeros(len(x_TH), dtype=torch.int64)
    for some in rows:
        logits_TR = some.logits(x_TH)
        log_sum_T = torch.logaddexp(log_sum_T, logits_TR.logsumexp(-1))
        noise_TR = torch.empty_like(logits_TR).exponential_(generator=generator).log_()
        largest_T, index_T = logits_TR.sub_(noise_TR).max(-1)
        label_T = torch.where(largest_T > best_T, index_T + some.first, label_T)
        best_T = torch.maximum(best_T, largest_T)
    return HeadLabels(log_sum_T, label_T)


def head_fisher(
    x_TH: Tensor, labels: HeadLabels, rows: Iterable[Rows], errors_of: Callable[[Rows], Iterable[Tensor]], count: int
) -> tuple[Tensor, list[float]]:
    """The gradient of log p(label) by what enters the head, [T, H], and the loss of each of `count` candidates.

    The loss is ½ mean Var_p(ΔW x): that is what KL is to second order in a change of logits.
    """
    gradient_TH = torch.zeros_like(x_TH)
    mean_CT, square_CT = torch.zeros((2, count, len(x_TH)))
    for some in rows:
        p_TR = some.logits(x_TH).sub_(labels.log_sum_T[:, None]).exp_()
        gradient_TH.addmm_(p_TR, some.weight_RH, alpha=-1)
        row_T = labels.label_T - some.first
        here_T = (row_T >= 0) & (row_T < len(some.weight_RH))
        gradient_TH[here_T] += some.weight_RH[row_T[here_T]]
        for candidate, error_RH in enumerate(errors_of(some)):
            change_TR = x_TH @ error_RH.T
            weighted_TR = p_TR * change_TR
            mean_CT[candidate] += weighted_TR.sum(-1)
            square_CT[candidate] += weighted_TR.mul_(change_TR).sum(-1)
    variance_CT = square_CT - mean_CT.square()
    return gradient_TH, [float(variance_T.mean()) / 2 for variance_T in variance_CT]
