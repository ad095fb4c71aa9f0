"""Muon for the matrices of hidden layers, AdamW for everything else, behind the face of one optimizer.

Muon (Jordan, 2024) steps along the momentum with all its singular values moved near 1, by Newton-Schulz iterations:

    momentum <- m momentum + (1 - m) gradient
    matrix   <- (1 - lr decay) matrix - lr scale NS((1 - m) gradient + m momentum)

It is `torch.optim.Muon`, to which tests hold it, but for two things. torch's takes 2-D tensors one at a time; a layer often
stores several matrices as one parameter, whose singular values have nothing to do with each other, and those of equal
shape are iterated together here:

    qkv                          query rows, key rows, value rows
    gate_up                      gate rows, up rows
    stacked experts [e, …, …]    each of these for every expert

And torch's iterates in bfloat16, whatever the parameters are. A number of the summed gradient that crosses a rounding
border, as some do when the ranks of the sum are others, then moves the update by up to 2^-8, and the iteration makes more of
it: on two ranks instead of one the loss of a small model differed by 1e-3 after 8 steps, by 1e-7 in float32, as under AdamW.
So the precision is that of the parameters unless bfloat16 is chosen, which is faster and depends on the mesh.

An expert without tokens has a zero gradient and goes on along its momentum, at full length, as it would not under AdamW:
the length of the momentum does not count. From zero momentum it stays where it is, but for decay.

Nor may it count where a gradient is zero but for rounding, as those of query and key rows are for sequences of one token:
rounding differs from mesh to mesh, and would be stretched to a full step. In float32 such gradients have 1e-9 to 3e-8 of
the length of all gradients together, and torch's own bound, a length of 1e-7, lets most of that through. So a matrix whose
direction is shorter than `ROUNDING` machine epsilons times the norm of all gradients, after clipping, is not moved. The
epsilon is that of the stored gradients: what computing in bfloat16 rounds beyond that is not seen. Inside a matrix that is
moved, directions in which its singular values are rounding alone grow by at most 3.4445 in each iteration.

Iterating needs whole matrices. Momentum is stored like its parameter; where FSDP2 has cut matrices up (parallel/state_shards.py),
the direction is gathered, every rank iterates the same whole matrices, and each takes the rows that are its own. That costs a
gathering of the hidden matrices a step, and the iteration is not divided between the ranks. Stacks that are cut between
experts have whole matrices on every rank, and gather nothing.

Shapes: M matrices, A rows, B columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.model.attention import Attention
from moetrain.moe.bank import ExpertBank
from moetrain.moe.experts import FeedForward
from moetrain.parallel.state_shards import local, shard_of

Group = dict[str, Any]                       # params, lr, weight_decay, and what the caller wants to find in it again
COEFFICIENTS = (3.4445, -4.7750, 2.0315)     # Jordan: steep at 0; what is not tiny ends between 0.68 and 1.2
ROUNDING_EPSILONS = 4                                 # measured: rounding reaches 0.3 epsilons, the smallest gradient of an expert 4e-3 of the norm


class MuonSettings(NamedTuple):
    """Muon's own: see the keys optim.muon_*. bfloat16: iterate in it, not in the precision of the parameters."""

    momentum: float
    adjust: str
    iterations: int
    bfloat16: bool


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer to its users: `param_groups` and `state`, by parameter, are those of both.

    model: says which rows of a parameter are a matrix. hidden: groups for Muon, of parameters of two or three dimensions;
    their `gradient_norm`, of all gradients of the step, says what is rounding (0 unless it is set: nothing but zeros).
    rest: groups for AdamW. adamw: what torch's class takes for all of them.
    """

    def __init__(self, model: nn.Module, hidden: list[Group], rest: list[Group], *, muon: MuonSettings,
                 adamw: dict[str, Any]) -> None:
        self.adamw = torch.optim.AdamW(rest, **adamw)
        super().__init__([*hidden, *self.adamw.param_groups], {})
        self.adamw.state = self.state
        self.settings = muon
        self.hidden = self.param_groups[:len(hidden)]
        self.rows = matrix_rows(model)
        for group in self.hidden:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.hidden:
            for parameter in group["params"]:
                self._step(parameter, group["lr"], group["weight_decay"], group.get("gradient_norm", 0.0))
        self.adamw.step()

    def _step(self, parameter: nn.Parameter, rate: float, decay: float, gradient_norm: float) -> None:
        """Waits for the other ranks where the matrices of the parameter are cut up."""
        gradient, own = local(parameter.grad), local(parameter.data)
        momentum = local(self.state[parameter]["momentum_buffer"]).lerp_(gradient, 1 - self.settings.momentum)
        direction = gradient.lerp(momentum, self.settings.momentum)
        floor = ROUNDING_EPSILONS * torch.finfo(direction.dtype).eps * gradient_norm
        own.mul_(1 - rate * decay)
        dim, begin = shard_of(parameter)
        if isinstance(parameter, DTensor) and dim == parameter.ndim - 2:             # matrices are cut, between their rows
            update = self._update(parameter, gather_whole(direction, parameter), floor).narrow(dim, begin, own.shape[dim])
        else:
            update = self._update(parameter, direction, floor)
        own.add_(update, alpha=-rate)

    def _update(self, parameter: nn.Parameter, direction: Tensor, floor: float) -> Tensor:
        """Orthogonal and scaled, matrix by matrix; stored like the direction."""
        compute = torch.bfloat16 if self.settings.bfloat16 else direction.dtype
        stacked = direction if direction.ndim == 3 else direction[None]
        kinds = stacked.split(self.rows.get(parameter, stacked.shape[1]), 1)         # matrices of one kind, of all experts
        updates = [orthogonalize(kind_MAB.to(compute), self.settings.iterations, floor).to(direction.dtype)
                   * scale(*kind_MAB.shape[1:], self.settings.adjust) for kind_MAB in kinds]
        return torch.cat(updates, 1).view(direction.shape)


def gather_whole(part: Tensor, parameter: DTensor) -> Tensor:
    """A tensor stored like a sharded parameter, gathered on every rank. Waits."""
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, shape=parameter.shape,
                              stride=parameter.stride()).full_tensor()


def matrix_rows(model: nn.Module) -> dict[nn.Parameter, list[int]]:
    """How many rows belong to each of the matrices that lie in one parameter, for those that hold several."""
    rows = {}
    for module in model.modules():
        if isinstance(module, Attention):
            kv_rows = module.num_kv_heads * module.head_dim
            rows[module.qkv] = [module.num_heads * module.head_dim, kv_rows, kv_rows]
        elif isinstance(module, (FeedForward, ExpertBank)):
            rows[module.gate_up] = [module.gate_up.shape[-2] // 2] * 2
    return rows


def orthogonalize(x_MAB: Tensor, iterations: int, floor: float = 0.0) -> Tensor:
    """The matrices with singular values near 1 and the same singular vectors.

    Zeros, and matrices whose Frobenius norm is at most `floor`, become zeros.
    """
    a, b, c = COEFFICIENTS
    tall = x_MAB.shape[1] > x_MAB.shape[2]
    x = x_MAB.mT if tall else x_MAB
    length_M11 = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = (x / length_M11.clamp(min=1e-7)).masked_fill(length_M11 <= floor, 0.0)        # then no singular value is above 1
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def scale(rows: int, columns: int, adjust: str) -> float:
    """match_rms_adamw: updates as long as AdamW's, about 0.2 a number (Moonshot, 2025). original: Jordan's."""
    return 0.2 * max(rows, columns) ** 0.5 if adjust == "match_rms_adamw" else max(1.0, rows / columns) ** 0.5
