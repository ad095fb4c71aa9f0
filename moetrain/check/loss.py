"""Checks of an auxiliary loss: contributions add up, however a batch is split, and slopes are gradients.

Shapes: T tokens, E experts, R routers.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moetrain.check.findings import Check, NotTried, checks_of
from moetrain.losses.base import AuxLoss, Pooled
from moetrain.ops.gating import gather_weights
from moetrain.ops.router_sums import Decided, Noise, extra_sums, importance, router_sums
from moetrain.routers.base import RoutingStats
from moetrain.routers.stack import Stack, stacks

EXPERTS, TOKENS, ROUTERS = 8, 24, 2


def loss_checks(make: Callable[[], AuxLoss]) -> Iterator[Check]:
    """List the checks of a loss that `make` builds."""
    return checks_of({
        "its value has one number for each router": (
            _has_one_value_a_router, "sum over experts with .sum(-1), never with .sum()"),
        "contributions of parts of a batch add up": (
            _adds_up, "divide by pooled.tokens, not by a count of the micro-batch, and take loads from "
            "pooled.counts_E"),
        "slopes are the gradient of the value": (
            _has_right_slopes, "let slopes return d value / d sum for every sum that value reads"),
        "a batch without tokens costs nothing and is finite": (
            _is_finite_on_nothing, "guard divisions with .clamp(min=1)"),
    }, make)


def _decisions(first: int, last: int, loss: AuxLoss) -> Stack:
    """Statistics of tokens `first` to `last` of two routers, with graph, and the further sums of the loss."""
    stats: dict[str, RoutingStats] = {}
    for router in range(ROUTERS):
        generator = torch.Generator().manual_seed(router)
        logits_TE = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)[first:last]
        logits_TE.requires_grad_()
        deviation_TE = torch.rand(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)[first:last]
        noise = Noise(logits_TE + deviation_TE, deviation_TE)
        ids_TK = noise.noisy_TC.topk(2).indices if len(logits_TE) else torch.zeros(0, 2, dtype=torch.int64)
        sequences = torch.arange(0, last - first + 1, 4) if _per_sequence(loss) else None
        probs_TE = logits_TE.softmax(-1)
        sums = router_sums(probs_TE, logits_TE, ids_TK, None, sequences)
        forms = {**loss.token_sums, **dict.fromkeys(loss.NEEDS_SUMS, importance)}
        decided = Decided(probs_TE, logits_TE, ids_TK, gather_weights(probs_TE, ids_TK), noise)
        if forms:
            sums = sums._replace(extra=extra_sums(forms, decided, None))
        if loss.token_values:
            sums = sums._replace(values=extra_sums(loss.token_values, decided, None))
        stats[f"layers.{router}.moe"] = sums
    (stack,) = stacks(stats)
    return stack


def _pooled(whole: Stack, loss: AuxLoss, tokens: int = TOKENS) -> Pooled:
    named = whole.stats.named()
    sums = {name: named[name].detach().double() for name in loss.pooled_sums}
    predicted_T = torch.arange(tokens) % 3 - 1           # of every kind
    experts = ROUTERS * (EXPERTS - 2,)
    return Pooled(whole.stats.counts_E, torch.tensor(tokens), sums or None, experts, predicted_T)


def _has_one_value_a_router(make: Callable[[], AuxLoss]) -> None:
    loss = make()
    whole = _decisions(0, TOKENS, loss)
    value_R = loss.value(whole.stats, _pooled(whole, loss))
    assert value_R.shape == (ROUTERS,), f"{ROUTERS} routers give a value of shape {list(value_R.shape)}"
    assert value_R.isfinite().all(), "the value is not finite"


def _adds_up(make: Callable[[], AuxLoss]) -> None:
    loss = make()
    if getattr(loss, "scope", None) == "micro":
        raise NotTried("the loss depends on the split by choice: its scope is a micro-batch")
    whole = _decisions(0, TOKENS, loss)
    pooled = _pooled(whole, loss)
    value_R = loss.value(whole.stats, pooled)
    for size in (4, 8):
        parts = ((_decisions(i, i + size, loss), slice(i, i + size)) for i in range(0, TOKENS, size))
        assert pooled.predicted_T is not None
        summed_R: Tensor = sum(
            loss.value(part.stats, pooled._replace(predicted_T=pooled.predicted_T[rows]))
            for part, rows in parts)
        apart = ((summed_R - value_R).abs() / value_R.abs().clamp(min=1e-12)).max().item()
        assert apart < 1e-9, (f"{TOKENS // size} micro-batches give {summed_R[0].item():.6g}, "
                              f"the batch as a whole {value_R[0].item():.6g}")


def _has_right_slopes(make: Callable[[], AuxLoss]) -> None:
    loss = make()
    whole = _decisions(0, TOKENS, loss)
    pooled = _pooled(whole, loss)
    fields = {name: value for name, value in whole.stats.named().items() if value.requires_grad}
    gradients = torch.autograd.grad(loss.value(whole.stats, pooled).sum(), list(fields.values()),
                                    allow_unused=True)
    slopes = loss.slopes(whole.stats, pooled)
    assert set(slopes) <= set(fields), f"slopes of {', '.join(set(slopes) - set(fields))} have no gradient"
    for (name, value), gradient in zip(fields.items(), gradients):
        ours = slopes.get(name, torch.zeros(())).expand(value.shape).to(value.dtype)
        its = torch.zeros_like(value) if gradient is None else gradient
        assert torch.allclose(ours, its, rtol=1e-6, atol=1e-15), (
            f"the slope at {name} is {ours.flatten()[0].item():.6g}, "
            f"the gradient {its.flatten()[0].item():.6g}")


def _is_finite_on_nothing(make: Callable[[], AuxLoss]) -> None:
    loss = make()
    if _per_sequence(loss):
        raise NotTried("a loss of each sequence is never asked about none")
    empty = _decisions(0, 0, loss)
    value_R = loss.value(empty.stats, _pooled(empty, loss, 0))
    assert value_R.isfinite().all(), "it is not finite"


def _per_sequence(loss: AuxLoss) -> bool:
    return bool(getattr(loss, "per_sequence", False))
