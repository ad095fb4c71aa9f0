"""AdamW with parameter groups (dense, router, expert; norms and embeddings undecayed), warm-up and cosine.

The learning rate is a pure function of the step: nothing of the schedule is state.
"""

import math

import torch
from torch import nn

from moetrain.config.schema import OptimConfig
from moetrain.moe.bank import is_expert_parameter
from moetrain.routers.base import Router


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over every parameter; each group knows its `name` and its `lr_scale`."""
    is_expert = is_expert_parameter(model)
    routers = {id(p) for m in model.modules() if isinstance(m, Router) for p in m.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"dense": [], "undecayed": [], "router": [], "expert": []}
    for name, parameter in model.named_parameters():
        if is_expert(parameter):
            kind = "expert"
        elif id(parameter) in routers:
            kind = "router"
        elif parameter.ndim == 1 or name in ("embed", "head"):
            kind = "undecayed"
        else:
            kind = "dense"
        groups[kind].append(parameter)
    decay = {"dense": optim.weight_decay, "expert": optim.weight_decay}
    scale = {"router": optim.router_lr_scale, "expert": optim.expert_lr_scale}
    return torch.optim.AdamW(
        [
            {"params": parameters, "name": kind, "weight_decay": decay.get(kind, 0.0), "lr_scale": scale.get(kind, 1.0)}
            for kind, parameters in groups.items()
            if parameters
        ],
        lr=optim.lr,
        betas=tuple(optim.betas),
        eps=optim.eps,
        fused=True,
    )


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Rate of optimizer step `step` (from 1): linear warm-up to lr, then a cosine to lr * min_lr_ratio at `steps`."""
    if step <= optim.warmup:
        return optim.lr * step / optim.warmup
    progress = min(1.0, (step - optim.warmup) / max(1, steps - optim.warmup))
    floor = optim.lr * optim.min_lr_ratio
    return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def allocate_state(optimizer: torch.optim.AdamW) -> None:
    """Create AdamW's moments and step counters as zeros, as its first step would, without taking a step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
