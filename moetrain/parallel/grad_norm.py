"""Global gradient norm and clipping where parameters live on different ranks.

Every shard of a parameter counts exactly once. The squares of dense gradients are summed over the ranks that
shard them (`dense_shard`), those of experts over the ranks that together hold all experts (`expert_parts`).
Ranks that hold the same shard have equal gradients after the reduction, and one of them counts. So it is with
scalars, which FSDP2 leaves whole on every rank (fsdp.py): they count at the first position of `dense_shard`.
Frozen parameters have no gradient and no part in the norm.
"""

import torch
from torch import Tensor, nn

from moetrain.comm.mesh import Mesh
from moetrain.comm.reduce import sum_over
from moetrain.parallel.state_shards import local


@torch.no_grad()
def global_norm(dense: list[nn.Parameter], experts: list[nn.Parameter], mesh: Mesh) -> Tensor:
    """Compute the L2 norm of all gradients, after their reduction. Waits for a sum over each of two groups.

    Args:
        dense: trainable parameters of the dense part, with gradients.
        experts: trainable parameters of routed experts, with gradients.
        mesh: mesh of the run.

    Returns:
        float64 scalar on the device, the same on every rank.
    """
    shards = mesh["dense_shard"]
    counted = [parameter for parameter in dense if parameter.ndim or shards.position == 0]
    dense_sum = sum_over(shards, _square_sum(counted, mesh.device))
    return (dense_sum + sum_over(mesh["expert_parts"], _square_sum(experts, mesh.device))).sqrt()


@torch.no_grad()
def scale_gradients(parameters: list[nn.Parameter], norm: float, limit: float) -> float:
    """Clip gradients in place: scale them by limit / (norm + 1e-6) if that is below 1.

    The formula is that of torch's clip_grad_norm_.

    Args:
        parameters: parameters with gradients, dense and of experts.
        norm: their global norm.
        limit: largest norm; 0 leaves the gradients unchanged.

    Returns:
        The norm after clipping.
    """
    factor = limit / (norm + 1e-6)
    if not 0 < factor < 1:
        return norm
    torch._foreach_mul_(_gradients(parameters), factor)
    return norm * factor


def _square_sum(parameters: list[nn.Parameter], device: torch.device) -> Tensor:
    """Sum the squares of the gradients on this rank, float64 scalar."""
    gradients = [gradient for gradient in _gradients(parameters) if gradient.numel()]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """List the parts of the gradients that this rank stores."""
    return [local(parameter.grad) for parameter in parameters]
