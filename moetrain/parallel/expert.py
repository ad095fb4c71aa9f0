"""The global gradient norm when experts live on different ranks.

Dense gradients are the same on every rank after their reduction: they count once. Expert gradients are the same on the
ranks of `expert_grad` and different along `ep`: their squares are summed over `ep`, so every expert counts exactly once.
"""

import torch
from torch import Tensor, nn

from moetrain.comm.mesh import Group
from moetrain.comm.reduce import sum_over


@torch.no_grad()
def global_norm(dense: list[nn.Parameter], experts: list[nn.Parameter], ep: Group) -> Tensor:
    """L2 norm of all reduced gradients, float64 scalar, the same on every rank. Waits for one sum over `ep`."""
    return (_square_sum(dense) + sum_over(ep, _square_sum(experts, like=dense))).sqrt()


@torch.no_grad()
def scale_gradients(parameters: list[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients so that their global norm is at most `limit` (0: leave them)."""
    if limit > 0 and norm > limit:
        torch._foreach_mul_([parameter.grad for parameter in parameters], (limit / norm).item())


def _square_sum(parameters: list[nn.Parameter], like: list[nn.Parameter] | None = None) -> Tensor:
    if not parameters:
        device = like[0].device if like else None
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm([parameter.grad for parameter in parameters])
    return torch.stack(norms).double().square().sum()
