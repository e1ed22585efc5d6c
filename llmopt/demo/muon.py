"""Muon: momentum whose update is made orthogonal, so that no direction of a matrix learns much faster than others.

K. Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024. In short runs on the demo's
stories it came closer to the oracle than AdamW did in as many steps. torch has a Muon too, which computes in bfloat16:
processors without instructions for that format take longer for such a step than for all the rest.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

# The quintic a x + b x³ + c x⁵ that drives singular values towards 1 fastest; it leaves them between about 0.7 and 1.2.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon:
    """Optimizer of the matrices between embedding and head."""

    def __init__(self, matrices: Iterable[Parameter], *, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        self._momenta = {matrix: torch.zeros_like(matrix) for matrix in matrices}
        self._momentum = momentum
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change every matrix by its gradient; each element by about a fifth of `rate`, as AdamW's steps are."""
        for matrix, momentum in self._momenta.items():
            assert matrix.grad is not None, "the loss depends on every matrix"
            momentum.mul_(self._momentum).add_(matrix.grad)
            update = orthogonal(matrix.grad + self._momentum * momentum)
            matrix.mul_(1.0 - rate * self._weight_decay)
            matrix.add_(update, alpha=-rate * 0.2 * max(matrix.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly U Vᵀ of the singular value decomposition U S Vᵀ, by Newton and Schulz' iteration."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / (wide.norm() + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide is matrix else x.T
