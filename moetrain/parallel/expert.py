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
    """Scale all gradients by limit / (norm + 1e-6) where that is below 1, as torch's clip_grad_norm_ does (0: leave them)."""
    factor = limit / (norm.item() + 1e-6)
    if 0 < factor < 1:
        torch._foreach_mul_([parameter.grad for parameter in parameters], factor)


def _square_sum(parameters: list[nn.Parameter], like: list[nn.Parameter] | None = None) -> Tensor:
    if not parameters:
        device = like[0].device if like else None
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm([parameter.grad for parameter in parameters])
    return torch.stack(norms).double().square().sum()
