"""The global gradient norm when parameters live on different ranks.

Every piece of a parameter counts exactly once: dense gradients are summed over the ranks that cut them up (`dense_shard`),
those of experts over the ranks that together hold all experts (`expert_parts`). Replicas hold equal gradients after the
reduction and count once.
"""

import torch
from torch import Tensor, nn

from moetrain.comm.mesh import Mesh
from moetrain.comm.reduce import sum_over
from moetrain.parallel.state_shards import local


@torch.no_grad()
def global_norm(dense: list[nn.Parameter], experts: list[nn.Parameter], mesh: Mesh) -> Tensor:
    """L2 norm of all reduced gradients, float64 scalar, the same on every rank. Waits for a sum over each of two groups."""
    dense_sum = sum_over(mesh["dense_shard"], _square_sum(dense, mesh.device))
    return (dense_sum + sum_over(mesh["expert_parts"], _square_sum(experts, mesh.device))).sqrt()


@torch.no_grad()
def scale_gradients(parameters: list[nn.Parameter], norm: float, limit: float) -> float:
    """Scale all gradients by limit / (norm + 1e-6) where that is below 1, as torch's clip_grad_norm_ does (0: leave them).

    Returns their norm afterwards.
    """
    factor = limit / (norm + 1e-6)
    if not 0 < factor < 1:
        return norm
    torch._foreach_mul_(_gradients(parameters), factor)
    return norm * factor


def _square_sum(parameters: list[nn.Parameter], device: torch.device) -> Tensor:
    gradients = [gradient for gradient in _gradients(parameters) if gradient.numel()]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [local(parameter.grad) for parameter in parameters]
