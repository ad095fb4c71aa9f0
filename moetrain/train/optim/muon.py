"""Muon for the matrices of hidden layers and AdamW for all other parameters, as one optimizer.

Muon (Jordan, 2024) updates along the momentum, whose singular values Newton-Schulz iterations move near 1:

    momentum <- m momentum + (1 - m) gradient
    matrix   <- (1 - lr decay) matrix - lr scale NS((1 - m) gradient + m momentum)

It equals `torch.optim.Muon`, to which tests compare it, with two exceptions. First, torch's takes 2-D tensors
one at a time. A layer here often stores several matrices in one parameter; their singular values are
independent, and matrices of equal shape are iterated together:

    qkv                          query rows, key rows, value rows
    gate_up                      gate rows, up rows
    stacked experts [e, …, …]    each of these for every expert

Second, torch's iterates in bfloat16, whatever the dtype of the parameters. An element of the summed gradient
that crosses a rounding border, as some do when other ranks form the sum, then moves the update by up to 2^-8,
and the iteration amplifies that: on two ranks instead of one the loss of a small model differed by 1e-3 after
8 steps, against 1e-7 in float32, as with AdamW. The precision is therefore that of the parameters unless
bfloat16 is chosen, which is faster but makes results depend on the mesh.

An expert without tokens has a zero gradient and continues along its momentum at full length, unlike with
AdamW, because the length of the momentum does not count. With zero momentum only weight decay moves it.

Gradients that are zero except for rounding, as those of query and key rows for sequences of one token, must
not move a matrix: rounding differs between meshes and would be stretched to a full step. In float32 such
gradients have 1e-9 to 3e-8 of the norm of all gradients; torch's own bound, a norm of 1e-7, lets most of that
through. A matrix whose direction is shorter than `ROUNDING_EPSILONS` machine epsilons times the norm of all
gradients, after clipping, is therefore not moved. The epsilon is that of the stored gradients, so rounding of
a computation in bfloat16 beyond that is not detected. Inside a matrix that is moved, directions whose
singular values are rounding alone grow by a factor of at most 3.4445 in each iteration.

The iteration needs whole matrices. Momentum is stored like its parameter. Where FSDP2 shards a matrix
(parallel/state_shards.py), the direction is gathered, every rank iterates the same whole matrices, and each
keeps its own rows. That costs one all-gather of the hidden matrices a step, and the ranks do not share the
iteration. Stacks that are sharded between experts have whole matrices on every rank and gather nothing.

Shapes: M matrices, A rows, B columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.model.attention import Attention
from moetrain.model.attention_experts import AttentionExperts
from moetrain.model.feed_forward import FeedForward
from moetrain.model.latent_attention import LatentAttention
from moetrain.moe.bank import ExpertBank
from moetrain.parallel.state_shards import local, shard_of

Group = dict[str, Any]                    # params, lr, weight_decay, and entries of the caller
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan: steep at 0; all but tiny values end between 0.68 and 1.2
# Measured: rounding reaches 0.3 epsilons, and the smallest gradient of an expert has 4e-3 of the norm.
ROUNDING_EPSILONS = 4


class MuonSettings(NamedTuple):
    """Settings of Muon, from the keys optim.muon_*."""

    momentum: float
    adjust: str      # how updates are scaled, see `scale`
    iterations: int
    bfloat16: bool   # iterate in bfloat16, not in the precision of the parameters


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer: `param_groups` and `state`, by parameter, are those of both.

    The entry `gradient_norm` of a group for Muon is the norm of all gradients of the step, by which rounding
    is told from gradients; without it only zeros count as rounding.

    Args:
        model: its modules define which rows of a parameter form a matrix.
        hidden: groups for Muon, with parameters of two or three dimensions.
        rest: groups for AdamW; none where all other parameters are frozen.
        muon: settings of Muon.
        adamw: arguments of torch.optim.AdamW.
    """

    def __init__(self, model: nn.Module, hidden: list[Group], rest: list[Group], *, muon: MuonSettings,
                 adamw: dict[str, Any]) -> None:
        self.adamw = torch.optim.AdamW(rest, **adamw) if rest else None
        super().__init__([*hidden, *(self.adamw.param_groups if self.adamw else [])], {})
        if self.adamw:
            self.adamw.state = self.state
        self.settings = muon
        self.hidden = self.param_groups[:len(hidden)]
        self.rows = matrix_rows(model)
        for group in self.hidden:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters."""
        for group in self.hidden:
            for parameter in group["params"]:
                self._step(parameter, group["lr"], group["weight_decay"], group.get("gradient_norm", 0.0))
        if self.adamw:
            self.adamw.step()

    def _step(self, parameter: nn.Parameter, rate: float, decay: float, gradient_norm: float) -> None:
        """Update one parameter; collective where its matrices are sharded."""
        gradient, own = local(parameter.grad), local(parameter.data)
        momentum = local(self.state[parameter]["momentum_buffer"]).lerp_(gradient, 1 - self.settings.momentum)
        direction = gradient.lerp(momentum, self.settings.momentum)
        floor = ROUNDING_EPSILONS * torch.finfo(direction.dtype).eps * gradient_norm
        own.mul_(1 - rate * decay)
        dim, begin = shard_of(parameter)
        if isinstance(parameter, DTensor) and dim == parameter.ndim - 2:  # matrices are sharded by rows
            update = self._update(
                parameter, gather_whole(direction, parameter), floor).narrow(dim, begin, own.shape[dim])
        else:
            update = self._update(parameter, direction, floor)
        own.add_(update, alpha=-rate)

    def _update(self, parameter: nn.Parameter, direction: Tensor, floor: float) -> Tensor:
        """Orthogonalize and scale a direction, matrix by matrix."""
        compute = torch.bfloat16 if self.settings.bfloat16 else direction.dtype
        stacked = direction if direction.ndim == 3 else direction[None]
        # Each part holds the matrices of one kind, of all experts.
        kinds = stacked.split(self.rows.get(parameter, stacked.shape[1]), 1)
        updates = [orthogonalize(kind_MAB.to(compute), self.settings.iterations, floor).to(direction.dtype)
                   * scale(kind_MAB.shape[1], kind_MAB.shape[2], self.settings.adjust) for kind_MAB in kinds]
        return torch.cat(updates, 1).view(direction.shape)


def gather_whole(part: Tensor, parameter: DTensor) -> Tensor:
    """Gather a tensor that is sharded like a parameter on every rank. Collective, and waits."""
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, shape=parameter.shape,
                              stride=parameter.stride()).full_tensor()


def matrix_rows(model: nn.Module) -> dict[nn.Parameter, list[int]]:
    """Number of rows of each matrix in a parameter, for parameters that hold several matrices."""
    rows = {}
    for module in model.modules():
        if isinstance(module, Attention):
            kv_rows = module.num_kv_heads * module.head_dim
            rows[module.qkv.weight] = [module.num_heads * module.head_dim, kv_rows, kv_rows]
        elif isinstance(module, LatentAttention):
            rows[module.kv_a.weight] = [module.kv_rank, module.rope_dim]
        elif isinstance(module, AttentionExperts):
            rows[module.kv.weight] = [module.num_kv_heads * module.head_dim] * 2
        elif isinstance(module, FeedForward):
            rows[module.gate_up.weight] = [len(module.gate_up.weight) // 2] * 2
        elif isinstance(module, ExpertBank):
            rows |= {module.stacked(name): each for name, each in module.form.matrix_rows().items()}
    return rows


def orthogonalize(x_MAB: Tensor, iterations: int, floor: float = 0.0) -> Tensor:
    """Move the singular values of matrices near 1, with the same singular vectors.

    Zeros, and matrices whose Frobenius norm is at most `floor`, become zeros.

    Args:
        x_MAB: float [M, A, B].
        iterations: number of Newton-Schulz iterations.
        floor: Frobenius norm up to which a matrix is rounding alone.

    Returns:
        float [M, A, B].
    """
    a, b, c = COEFFICIENTS
    tall = x_MAB.shape[1] > x_MAB.shape[2]
    x = x_MAB.mT if tall else x_MAB
    length_M11 = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    # After the division no singular value is above 1, which the iteration needs.
    x = (x / length_M11.clamp(min=1e-7)).masked_fill(length_M11 <= floor, 0.0)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def scale(rows: int, columns: int, adjust: str) -> float:
    """Scale of an update, by the shape of its matrix.

    Args:
        rows: number of rows.
        columns: number of columns.
        adjust: `match_rms_adamw` makes updates as long as AdamW's, an RMS of about 0.2 (Moonshot,
            2025); `original` is Jordan's scale.
    """
    return 0.2 * max(rows, columns) ** 0.5 if adjust == "match_rms_adamw" else max(1.0, rows / columns) ** 0.5
