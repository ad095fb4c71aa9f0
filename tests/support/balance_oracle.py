"""Training steps, and the balance loss and gradients that the oracle computes for them."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from moetrain.train.step import train_step
from tests.support.oracle import oracle_loss
from tests.support.training import make_run, snapshot

STEPS, TURNS = 3, 4
BASE = ["run.dtype=float64", "balance.weight=0.3", "data.min_length=0.2", "train.clip=0"]
WORLDS = {1: [], 2: ["parallel=ep", "run.nproc=2"], 4: ["parallel=ep", "parallel.ep=2", "run.nproc=4"]}


def steps(overrides: list[str], per_node: int) -> list[tuple[dict, dict, float, dict]]:
    """(gradients, counts, reported balance, parameters before) of every step."""
    before, os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE"), str(per_node)
    try:
        run, found = make_run(overrides), []
    finally:
        os.environ.pop("LOCAL_WORLD_SIZE") if before is None else os.environ.update(LOCAL_WORLD_SIZE=before)
    for step in range(1, STEPS + 1):
        parameters = snapshot(run, lambda p: p.data)
        result = train_step(run, step)
        counts = {name: count.clone() for name, count in result.counts.items()}
        found.append((snapshot(run, lambda p: p.grad), counts, result.metrics["loss/balance"], parameters))
    return found


def truth(parameters: dict[str, Tensor], step: int, pools: Callable, prior: list[Tensor] | None):
    """(gradients, counts, balance of the whole step) from these parameters."""
    run = make_run([*BASE, "train.micro_batch=1"])
    params = {name.removesuffix(".weight"): tensor.clone().requires_grad_()
              for name, tensor in parameters.items()}
    batches = [(b.tokens_BS, b.targets_BS, b.valid_BS) for b in run.loader.step(step)]
    total, _, balance, counts = oracle_loss(
        params, batches, balance_weight=0.3, balance_pools=pools, balance_prior=prior, z_weight=0.01,
        num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, top_k=2, num_experts=8,
        norm_eps=run.config.model.norm_eps)
    total.backward()
    grads = {name: params[name.removesuffix(".weight")].grad for name in parameters}
    zeros = {name: torch.zeros_like(parameters[name]) for name, grad in grads.items() if grad is None}
    return {**grads, **zeros}, counts, balance.item()
