"""Comparison of the MoE layer with another library's: same weights and tokens; outputs and all gradients."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moetrain.losses.base import Pooled
from moetrain.losses.load_balance import LoadBalanceLoss
from moetrain.moe.layer import MoELayer
from moetrain.routers.base import RouterContext
from tests.support.training import make_run

TOKENS, DIM, EXPERTS = 24, 16, 8         # on each rank; experts in all


class Seen(NamedTuple):
    """Results on one rank; experts has (gradient of gate_up, gradient of down) by local expert."""

    out_TD: Tensor
    balance: Tensor
    x_grad: Tensor
    router_grad: Tensor
    experts: list[tuple[Tensor, Tensor]]


def our_layer(*overrides: str) -> MoELayer:
    """First layer of a tiny model on two ranks that share its experts, with routers far from uniform."""
    run = make_run(["parallel=ep", "run.nproc=2", "train.micro_batch=8", "run.dtype=float32", *overrides])
    layer = run.state.model.layers[0].moe
    with torch.no_grad():
        layer.router.weight.mul_(10)
    return layer


def tokens(rank: int) -> tuple[Tensor, Tensor]:
    """Draw (x [T, D], gradient of the output [T, D]) of a rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(TOKENS, DIM, generator=generator), torch.randn(TOKENS, DIM, generator=generator)


def ours(layer: MoELayer, rank: int, weight: float) -> Seen:
    """Run moetrain's layer; `weight` is that of the balance loss over this rank's tokens."""
    x, slope = tokens(rank)
    x.requires_grad_()
    output = layer(x, RouterContext(valid_T=torch.ones(TOKENS, dtype=torch.bool)))
    stats = output.stats[layer.name]
    pool = Pooled(stats.counts_E, torch.tensor(TOKENS))
    balance = LoadBalanceLoss(weight=weight, scope="micro").value(stats, pool)
    ((output.out_TD * slope).sum() + weight * balance).backward()
    bank = layer.experts.bank
    experts = list(zip(bank.gate_up.grad, bank.down.grad))
    return Seen(output.out_TD.detach(), balance.detach(), x.grad, layer.router.weight.grad, experts)


def theirs(forward: Callable[[Tensor], tuple[Tensor, Tensor]], router: nn.Parameter,
           experts: list[tuple[nn.Parameter, nn.Parameter]], rank: int, weight: float) -> Seen:
    """Run the other library's layer; `forward` maps x to (output, unweighted balance loss)."""
    x, slope = tokens(rank)
    x.requires_grad_()
    out, balance = forward(x)
    ((out * slope).sum() + weight * balance).backward()
    return Seen(out.detach(), balance.detach(), x.grad, router.grad,
                [(gate_up.grad, down.grad) for gate_up, down in experts])


def assert_same(mine: Seen, other: Seen, tolerance: float = 1e-5) -> None:
    """Compare every tensor, to `tolerance` of its largest value."""
    named = [("output", mine.out_TD, other.out_TD), ("balance", mine.balance, other.balance),
             ("x", mine.x_grad, other.x_grad), ("router", mine.router_grad, other.router_grad)]
    for expert, (our, its) in enumerate(zip(mine.experts, other.experts, strict=True)):
        named += [(f"gate_up {expert}", our[0], its[0]), (f"down {expert}", our[1], its[1])]
    for name, our, its in named:
        assert its.abs().max() > 0, name
        error = (our - its).abs().max() / its.abs().max()
        assert error <= tolerance, f"{name} differs by {error:.3g} of its largest value"
