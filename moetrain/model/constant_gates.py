"""Refusal of routers that the task cannot train: one expert a token, with a gate weight that is constant.

The weight of a token's only expert is all that connects a router with the cross-entropy. Where it is
normalized it is always 1, and the router stays as it started. Routers of moetrain say with which arguments
that is so, and the config is refused at once (config/rules/model.py). Whatever a router says, it is tried out
here, on a few random tokens on the host.
"""

import copy

import torch
from torch import Tensor, nn

from moetrain.errors import ConfigError
from moetrain.model.initialization import materialize
from moetrain.model.transformer import Transformer
from moetrain.routers.base import Router
from moetrain.routers.context import token_context

_TOKENS, _SEED = 16, 0


def refuse_constant_gates(model: Transformer) -> None:
    """Raise ConfigError for a router with parameters of which the weight of its one expert does not depend.

    Args:
        model: the model on the meta device.
    """
    dim = model.embed.shape[1]
    for name, router in model.routers.items():
        asked = router.max_slots() == 1 and router.CONSTANT_WEIGHTS is not False
        if asked and any(p.requires_grad for p in router.parameters()) and _is_constant(name, router, dim):
            cls = type(router)
            raise ConfigError(
                209, f"{name}: the gate weight of a token's one expert is constant",
                where=f"model.top_k, {cls.__module__}.{cls.__qualname__}",
                why="no parameter of the router has a gradient of it, so the task cannot train the router",
                next="weights that are not normalized, or model.top_k=2; if it is meant: "
                     f"CONSTANT_WEIGHTS = False in {cls.__name__}")


def _is_constant(name: str, router: Router, dim: int) -> bool:
    """Whether the weights of random tokens have a gradient of 0 at every parameter."""
    tried = copy.deepcopy(router)
    with torch.device("meta"):
        tried.stand_alone()
    materialize(tried, seed=_SEED, std=0.1, num_layers=1)
    generator = torch.Generator().manual_seed(_SEED)
    x_TD = torch.randn(_TOKENS, dim, generator=generator, dtype=torch.float64)
    tokens_BS, sequences_B = torch.arange(_TOKENS).view(-1, 4), torch.arange(_TOKENS // 4)
    context = token_context(tokens_BS, seed=_SEED, step=1, training=True, sample_ids_B=sequences_B,
                            domains_B=sequences_B % 2)._replace(router=name)
    try:
        with torch.enable_grad():
            weights_TK = tried.route(x_TD, context).weights_TK
    except Exception:
        return False                 # it needs more than this, as other layers; training reports its errors
    return not weights_TK.requires_grad or _without_gradient(weights_TK, tried, generator)


def _without_gradient(weights_TK: Tensor, router: nn.Module, generator: torch.Generator) -> bool:
    parameters = [parameter for parameter in router.parameters() if parameter.requires_grad]
    factors_TK = torch.rand(weights_TK.shape, generator=generator, dtype=weights_TK.dtype)
    grads = torch.autograd.grad((weights_TK * factors_TK).sum(), parameters, allow_unused=True)
    return all(grad is None or grad.abs().max() < 1e-12 for grad in grads)
