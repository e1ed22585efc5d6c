"""How much of a model's distribution an error in its weights costs, to second order.

With p the float model's distribution of the next token and q that of the model with errors,

    KL(p ‖ q)  ≈  ½ δᵀ F δ,    F = E[∇ log p(y) ∇ log p(y)ᵀ],  y drawn from p

where δ is the change of the weights and F the Fisher information (Martens 2014, "New insights and perspectives on the
natural gradient method", arXiv 1412.1193, sections 5 and 9). Labels are drawn from the model: with those of the text,
F would be another matrix. The sum of log p(y) over a window of text is what is differentiated: an error acts at every
token, and through attention on all that follow.

Of F the diagonal is kept, E[(∂ log p / ∂w)²]: rounding errors of different weights are not correlated, so all else
vanishes on average and would only add noise. The mean over tokens makes it nats a token.

At the head all labels are summed over, instead of one drawn, because all of their probabilities are there.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def add_information(sum_OI: Tensor, inputs_TI: Tensor, gradients_TO: Tensor) -> None:
    """Add what a window shows of a linear's weight: (Σ g_o x_i)², with the sum over its tokens."""
    sum_OI += (gradients_TO.T @ inputs_TI).square_()


def predicted_loss(information_OI: Tensor, error_OI: Tensor) -> float:
    """Nats a token that an error costs, ½ Σ F ΔW²; the information is the mean over tokens."""
    return float((information_OI * error_OI.square()).sum(dtype=torch.float64)) / 2


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a head, from `first` on: its weight, [rows, H], and its bias, [rows]."""

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


def head_gradient(x_TH: Tensor, labels: HeadLabels, rows: Iterable[Rows]) -> Iterator[tuple[Rows, Tensor, Tensor]]:
    """Some rows of the head at a time: what they add to the gradient of Σ log p(label) by x, [T, H], and their
    information, [rows, H].

    Labels of different tokens are drawn independently, and here an error acts on its own token alone, so that each adds
    p_v (1 - p_v) x_i².
    """
    squares_TH = x_TH.square()
    for some in rows:
        p_TR = some.logits(x_TH).sub_(labels.log_sum_T[:, None]).exp_()
        gradient_TH = p_TR @ some.weight_RH.neg()
        row_T = labels.label_T - some.first
        here_T = (row_T >= 0) & (row_T < len(some.weight_RH))
        gradient_TH[here_T] += some.weight_RH[row_T[here_T]]
        information_RH = p_TR.sub_(p_TR.square()).T @ squares_TH / len(x_TH)
        yield some, gradient_TH, information_RH
