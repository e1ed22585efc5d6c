"""Orthogonal updates."""

import pytest
import torch
from torch.nn import Parameter

from llmopt.train.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ orthogonal(matrix) @ v.T
    singular = rotated.diagonal()
    assert rotated.shape == (min(shape), min(shape))
    assert (rotated - torch.diag(singular)).abs().max() < 1e-6
    assert 0.6 < singular.min() < singular.max() < 1.25


def test_the_scale_of_a_matrix_makes_no_difference():
    matrix = torch.randn((4, 6), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(orthogonal(matrix), orthogonal(1000 * matrix), atol=1e-5)


def test_a_step_moves_each_element_by_about_a_fifth_of_the_rate():
    matrix = Parameter(torch.zeros(64, 16))
    matrix.grad = torch.randn((64, 16), generator=torch.Generator().manual_seed(2))
    Muon([matrix], lr=0.1).step()
    assert matrix.detach().square().mean().sqrt().item() == pytest.approx(0.02, rel=0.2)
    assert (matrix.detach() * matrix.grad).sum() < 0


def test_momentum_remembers_and_decay_shrinks():
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn((2, 8, 8), generator=generator)
    matrix = Parameter(torch.eye(8))
    muon = Muon([matrix], lr=0.5, momentum=0.5, weight_decay=0.1)
    expected, momentum = torch.eye(8), torch.zeros(8, 8)
    for gradient in (first, second):
        matrix.grad = gradient
        muon.step()
        momentum = 0.5 * momentum + gradient
        expected = 0.95 * expected - 0.5 * 0.2 * 8**0.5 * orthogonal(gradient + 0.5 * momentum)
    assert torch.allclose(matrix, expected, atol=1e-5)
