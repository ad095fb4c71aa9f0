"""Muon for the matrices of hidden layers, AdamW for everything else, behind the face of one optimizer.

Muon (Jordan, 2024) steps along the momentum with all its singular values moved near 1. The method is torch's own
(`torch.optim.Muon`: Newton-Schulz in bfloat16, decoupled decay); here is only what it is given. It takes 2-D tensors, and
what a layer stores as one parameter is often several matrices, whose singular values have nothing to do with each other:

    qkv                          query rows, key rows, value rows
    gate_up                      gate rows, up rows
    stacked experts [e, …, …]    each of these for every expert

Muon sees every such matrix as a view of parameter, gradient and momentum. The momentum itself is one tensor per
parameter, stored like it, so that checkpoints cut it up as they cut up the parameter (parallel/pieces.py).

Parity: every matrix lies whole on each rank that steps it, so all ranks run the same iteration on the same numbers. What
differs between meshes is the rounding of the summed gradient; a number of it that crosses a rounding border of bfloat16
moves the update of its matrix by up to 2^-9, relatively. In float64 runs that is next to impossible, in float32 rare.

An expert without tokens has a zero gradient and goes on along its momentum, at full length, as it would not under AdamW:
the length of the momentum does not count. From zero momentum it stays where it is, but for decay.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.model.attention import Attention
from moetrain.moe.bank import ExpertBank
from moetrain.moe.experts import FeedForward

Group = dict[str, Any]                       # params, lr, weight_decay, and what the caller wants to find in it again


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer to its users: `param_groups` and `state`, by parameter, are those of both.

    model: says which rows of a parameter are a matrix. hidden: groups for Muon, of parameters of two or three dimensions.
    rest: groups for AdamW. muon, adamw: what torch's two classes take for all their groups.
    """

    def __init__(self, model: nn.Module, hidden: list[Group], rest: list[Group], *, muon: dict[str, Any],
                 adamw: dict[str, Any]) -> None:
        self.adamw = torch.optim.AdamW(rest, **adamw)
        super().__init__([*hidden, *self.adamw.param_groups], {})
        self.adamw.state = self.state
        self.hidden = self.param_groups[:len(hidden)]
        self.rows = matrix_rows(model)
        self.views = {parameter: list(self._matrices(parameter, parameter.data))
                      for group in self.hidden for parameter in group["params"]}
        self.muon = torch.optim.Muon(
            [{"params": [view for parameter in group["params"] for view in self.views[parameter]],
              "weight_decay": group["weight_decay"]} for group in self.hidden], **muon)
        for parameter, views in self.views.items():
            momentum = torch.zeros_like(parameter)
            self.state[parameter]["momentum_buffer"] = momentum
            for view, part in zip(views, self._matrices(parameter, momentum)):
                self.muon.state[view]["momentum_buffer"] = part

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group, inner in zip(self.hidden, self.muon.param_groups):
            inner["lr"] = group["lr"]
        for parameter, views in self.views.items():
            for view, gradient in zip(views, self._matrices(parameter, parameter.grad)):
                view.grad = gradient
        self.muon.step()
        for views in self.views.values():
            for view in views:
                view.grad = None                         # what it looks at is freed with the parameter's gradient
        self.adamw.step()

    def _matrices(self, parameter: nn.Parameter, stored: Tensor) -> Iterator[Tensor]:
        """Views of a tensor stored like the parameter, one for every matrix: expert by expert, then from the top down."""
        rows = self.rows.get(parameter) or [parameter.shape[-2]]
        for expert in stored if stored.ndim == 3 else [stored]:
            yield from expert.split(rows)


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
