"""Rotary position embedding against its formula."""

import pytest
import torch
from torch import Tensor

from moetrain.model.rotary import rotary_table, rotate
from tests.support.rotary import turned

CPU, F64 = torch.device("cpu"), torch.float64


def table(positions: int, width: int, theta: float = 100.0) -> tuple[Tensor, Tensor]:
    return rotary_table(positions, width, theta, dtype=F64, device=CPU)


@pytest.mark.parametrize("positions, width", [(0, 4), (1, 2), (7, 6)])
def test_rotating_is_a_complex_product(positions, width):
    x = torch.randn(2, 3, positions, width, dtype=F64, requires_grad=True)
    ours, truth = rotate(x, table(positions, width)), turned(x)
    torch.testing.assert_close(ours, truth)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (ours, truth)))


def test_rotating_passes_gradcheck():
    x = torch.randn(1, 2, 3, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, table(3, 4)), x)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 8, dtype=F64)
    q_Sh, k_Sh = (rotate(t.expand(9, 8), table(9, 8)) for t in (q, k))
    scores = q_Sh @ k_Sh.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    assert (scores[5, 5] - scores[5, 0]).abs() > 1e-3


def test_angles_are_exact_at_late_positions():
    cos, _ = rotary_table(50_000, 2, 1e4, dtype=torch.float32, device=CPU)
    torch.testing.assert_close(cos[-1, 0], torch.tensor(49_999.0, dtype=F64).cos().float(), rtol=0, atol=0)
