"""The optimizer and its parameter groups.

    adamw    AdamW for every parameter
    muon     Muon for the matrices of hidden layers (attention, feed-forward networks, experts), AdamW for
             embedding, head, norms and routers (train/optim/muon.py)

Groups are dense, undecayed, router, expert and expert_vectors. Norms, embeddings, scalars, routers and
vectors of experts (biases) have no weight decay. Frozen parameters are in no group and have no moments.
lr_schedule.py has the learning rate.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moetrain.config.schema import OptimConfig
from moetrain.moe.bank import ExpertBank, is_expert_parameter
from moetrain.routers.base import Router
from moetrain.routers.shared import TiedModules
from moetrain.train.optim.muon import MuonAdamW, MuonSettings

HIDDEN = ("dense", "expert")                # groups that hold matrices of hidden layers only
OF_EXPERTS = ("expert", "expert_vectors")   # groups of routed experts


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer over the trainable parameters; each group has entries `name` and `lr_scale`."""
    groups = [_group(kind, parameters, optim) for kind, of_kind in sort_parameters(model).items()
              for parameters in _by_storage(of_kind)]
    adamw = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps, "fused": True}
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, **adamw)
    hidden, rest = ([group for group in groups if (group["name"] in HIDDEN) == chosen]
                    for chosen in (True, False))
    for group in hidden:
        group["lr_scale"] *= (optim.muon_lr or optim.lr) / optim.lr
    muon = MuonSettings(optim.muon_momentum, optim.muon_adjust, optim.muon_ns_steps,
                        optim.muon_precision == "bfloat16")
    return MuonAdamW(model, hidden, rest, muon=muon, adamw=adamw)


def sort_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort the trainable parameters by kind: matrices of hidden layers are dense, those of experts expert."""
    is_expert = is_expert_parameter(model)
    routers = {id(p) for m in model.modules() if isinstance(m, (Router, TiedModules)) for p in m.parameters()}
    vectors = {id(p) for m in model.modules() if isinstance(m, ExpertBank) for p in m.vectors}
    kinds: dict[str, list[nn.Parameter]] = {
        "dense": [], "undecayed": [], "router": [], "expert": [], "expert_vectors": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_expert(parameter):
            kind = "expert_vectors" if id(parameter) in vectors else "expert"
        elif id(parameter) in routers:
            kind = "router"
        elif parameter.ndim < 2 or name in ("embed", "head"):
            kind = "undecayed"
        else:
            kind = "dense"
        kinds[kind].append(parameter)
    return kinds


def _by_storage(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Divide parameters into those that FSDP2 shards and the others; the fused AdamW takes no mixture."""
    sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    return [some for some in (sharded, whole) if some]


def _group(kind: str, parameters: list[nn.Parameter], optim: OptimConfig) -> dict[str, Any]:
    decay = {"dense": optim.weight_decay, "expert": optim.weight_decay}
    scale = {"router": optim.router_lr_scale, **dict.fromkeys(OF_EXPERTS, optim.expert_lr_scale)}
    return {"params": parameters, "name": kind, "weight_decay": decay.get(kind, 0.0),
            "lr_scale": scale.get(kind, 1.0)}


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def set_gradient_norm(optimizer: torch.optim.Optimizer, norm: float) -> None:
    """Give every group the norm of all clipped gradients, by which Muon tells rounding from gradients."""
    for group in optimizer.param_groups:
        group["gradient_norm"] = norm


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Create AdamW's moments and step counters as zeros, as its first step would, without taking a step.

    Muon's momentum exists from the start.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the optimizer's tensors in the shape of parameters; not every parameter has all of them."""
    return tuple(sorted({name for state in optimizer.state.values() for name in state} - {"step"}))


def restore_steps(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the step counters of all parameters, which are updated at every step and so share one number."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)
