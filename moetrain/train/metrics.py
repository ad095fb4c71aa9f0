"""Metrics of a step, computed from sums over micro-batches and ranks.

    SumBuffer           collects the sums on this rank and reduces them in one collective
    StepSums            the reduced sums
    *_metrics           metrics from them; docs/reference/files.md has their names and meanings

Two buffers are reduced in a step: the pooled counts (int64, exact; train/count_pool.py or train/step.py), and
one float64 buffer of everything else, after the last backward.

A router may have choices that are no experts (routers/base.py). Probabilities, the balance loss and entropy
are over all C choices; what says how experts are loaded is over the first E of them, the experts.

Shapes: E experts, C choices, R routers of a stack, L = sum of C over routers.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.reduce import sum_over
from moetrain.losses.base import Pooled
from moetrain.ops.counts import load_error_sign
from moetrain.ops.pinned import to_device
from moetrain.routers.base import RoutingStats
from moetrain.routers.stack import Stack, by_stack
from moetrain.train.objective import Denominators, LossShare


class StepSums(NamedTuple):
    """Sums of a step over micro-batches and ranks; on the host, except `load_error_signs`."""

    language: float                          # sum of the language loss: nats, of cross-entropy
    total: float                             # the loss: contributions of all micro-batches
    violation: float                         # max violation inside micro-batches, summed over routers too
    violations: float                        # number of summands of `violation`
    dropped: float                           # slots dropped by a capacity policy, over all routers
    entropy: float                           # of the routers' probabilities, nats, over tokens and routers
    terms: dict[str, float]                  # contribution of every auxiliary loss to `total`, by name
    prob_sums_L: Tensor                      # float64 [L], summed probabilities of all routers
    counts_L: Tensor                         # int64 [L], counts of all routers
    tokens: int                              # valid tokens of the global batch, as often as they are routed
    language_terms: int                      # terms of the language loss in the global batch
    norm: float                              # norm of all gradients
    # float64 [C] on the device, mean over micro-batches; of the routers that need them (routers/base.py).
    load_error_signs: dict[str, Tensor]
    flags: list[float]                       # StepFlags of train/step.py
    phases: list[list[float]]                # seconds of every rank (train/loggers/stopwatch.py)
    extra: dict[str, dict[str, Tensor]]      # float64, further sums by name, then by router


HEAD = 7       # numbers of a SumBuffer before those of losses and routers: six of StepSums, and micro-batches


def flat_counts(stacks: Sequence[Stack], device: torch.device) -> Tensor:
    """Concatenate the counts of all routers of a micro-batch, int64 [L]."""
    parts = [stack.stats.counts_E.flatten() for stack in stacks]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)


def split_by_router(flat: Tensor, routers: Mapping[str, int]) -> dict[str, Tensor]:
    """Split a flat buffer [L] into views [C], by router name."""
    return dict(zip(routers, flat.split(list(routers.values()))))


def pool(flat_L: Tensor, routers: Mapping[str, int], tokens: Tensor,
         sums: Mapping[str, Mapping[str, Tensor]] | None = None,
         experts: Mapping[str, int] | None = None) -> list[Pooled]:
    """Make the argument of losses from pooled counts, for every stack.

    Args:
        flat_L: pooled counts [L], int64 or float64.
        routers: number of choices by router, in run order.
        tokens: int64 scalar, valid tokens of the global batch.
        sums: pooled sums by router and name; None if no loss asks for any.
        experts: number of experts by router; None: all choices are experts.

    Returns:
        One record for each stack of consecutive routers of the same size (routers/stack.py `stacks`).
    """
    names, pooled = iter(routers), []
    for counts_RC in by_stack(flat_L, routers):
        alike = [next(names) for _ in counts_RC]
        of = [sums[name] for name in alike] if sums else []
        stacked = {name: torch.stack([each[name] for each in of]) for name in of[0]} if of else None
        pooled.append(Pooled(counts_RC, tokens, stacked, tuple((experts or routers)[name] for name in alike)))
    return pooled


def only_experts(counts_RC: Tensor, experts: Sequence[int]) -> Tensor:
    """Set the counts of choices that are no experts to 0.

    Args:
        counts_RC: counts of a stack of routers.
        experts: number of experts of each of its routers.
    """
    if all(number == counts_RC.shape[1] for number in experts):
        return counts_RC
    is_expert = torch.arange(counts_RC.shape[1]) < torch.tensor(experts)[:, None]
    return counts_RC.where(to_device(is_expert, counts_RC.device), 0)


class SumBuffer:
    """Collects the float64 sums of a step on this rank, then sums them over ranks in one collective.

    Args:
        routers: number of choices by router, in run order.
        experts: number of experts by router.
        device: device of the sums.
        flags: flags of this rank, which are summed in the same collective.
        routers_needing_load_error: names of the routers for which signs of load errors are averaged.
        losses: names of the auxiliary losses that are trained on.
    """

    def __init__(self, routers: Mapping[str, int], experts: Mapping[str, int], device: torch.device,
                 flags: Sequence[int] = (), routers_needing_load_error: Sequence[str] = (),
                 losses: Sequence[str] = ()) -> None:
        self.experts = dict(experts)
        self.routers, self.routers_needing_load_error, self.losses = (
            routers, {router: routers[router] for router in routers_needing_load_error}, tuple(losses))
        self.flags = torch.tensor(flags, dtype=torch.float64)
        self.sizes = [HEAD, len(self.losses), sum(routers.values()),
                      sum(self.routers_needing_load_error.values())]
        self.flat = torch.zeros(sum(self.sizes), dtype=torch.float64, device=device)
        self.extra: dict[tuple[str, str], Tensor] = {}       # by name and router, the same on every rank

    @torch.no_grad()
    def add(self, language: Tensor, share: LossShare, stacks: Sequence[Stack]) -> None:
        """Add the sums of a micro-batch.

        Args:
            language: scalar, sum of the language loss.
            share: contribution of the micro-batch to the loss.
            stacks: statistics of its routers.
        """
        zero = self.flat.new_zeros(())
        terms = (share.terms.get(name, zero).double() for name in self.losses)
        head = torch.stack([language.double(), share.total.double(), *self._of_routers(stacks),
                            self.flat.new_ones(()), *terms])
        load_error_signs = (
            sign_E for stack in stacks if self.routers_needing_load_error
            for router, sign_E in zip(stack.routers, load_error_sign(stack.stats.counts_E))
            if router in self.routers_needing_load_error)
        for stack in stacks:
            for name, of_routers in (stack.stats.extra or {}).items():
                for router, total in zip(stack.routers, of_routers.detach().double()):
                    self.extra[name, router] = self.extra[name, router] + total if (
                        name, router) in self.extra else total
        self.flat += torch.cat(
            [head, *(stack.stats.prob_sum_E.flatten() for stack in stacks), *load_error_signs])

    def _of_routers(self, stacks: Sequence[Stack]) -> list[Tensor]:
        """Sums over all routers: max violation, its number of summands, dropped slots, entropy."""
        if not stacks:
            return [self.flat.new_zeros(())] * 4
        of = [_summed(stack.stats, [self.experts[router] for router in stack.routers]) for stack in stacks]
        return [sum(rest, first).double() for first, *rest in zip(*of)]

    def sum_over(self, group: Group, phases: Sequence[float], counts_L: Tensor,
                 denominators: Denominators, norm: Tensor) -> StepSums:
        """Sum over the group, and copy all numbers of the step to the host. Collective.

        This is the one place in a step where the host waits for the device. The sum also gathers the phases:
        each rank adds them to a row of its own.

        Args:
            group: the ranks that read different tokens.
            phases: seconds of each phase on this rank.
            counts_L: int64 [L], already pooled over the group; exact in float64.
            denominators: already pooled over the group.
            norm: scalar, norm of all gradients.

        Returns:
            The sums of the step.
        """
        times = torch.zeros(group.size, len(phases), dtype=torch.float64)
        times[group.position] = torch.tensor(phases, dtype=torch.float64)
        told = to_device(torch.cat([self.flags, times.flatten()]), self.flat.device)
        extra = [total.flatten() for total in self.extra.values()]
        summed = sum_over(group, torch.cat([self.flat, told, *extra]))
        read = torch.cat([summed, counts_L.double(), torch.stack(denominators).double(),
                          norm.double().view(1)]).cpu()
        head, terms, prob_sums, _, flags, times, *totals, counts, whole = read.split(
            [*self.sizes, len(self.flags), times.numel(), *map(len, extra), len(counts_L), 3])
        found: dict[str, dict[str, Tensor]] = {}
        for (name, router), like, total in zip(self.extra, self.extra.values(), totals, strict=True):
            found.setdefault(name, {})[router] = total.view(like.shape)
        *sums, micro_batches = head.tolist()
        tokens, language_terms, norm = whole.tolist()
        load_error_signs = summed[sum(self.sizes[:-1]):sum(self.sizes)] / micro_batches
        return StepSums(
            *sums, dict(zip(self.losses, terms.tolist())), prob_sums, counts.long(), int(tokens),
            int(language_terms), norm,
            split_by_router(load_error_signs, self.routers_needing_load_error), flags.tolist(),
            times.view(group.size, -1).tolist(), found)


def _summed(stats: RoutingStats, experts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the routers of a stack.

    Args:
        stats: statistics of the stack.
        experts: number of experts of each of its routers.

    Returns:
        Max violation (max load / mean load - 1, float64; 0 where nothing was routed), number of routers
        where something was routed, dropped slots, and entropy.
    """
    counts_RC = only_experts(stats.counts_E, experts)
    slots_R = counts_RC.sum(-1)
    # One number where it is the same for all, which is nearly always so and moves nothing to the device.
    many = experts[0] if len(set(experts)) == 1 else to_device(torch.tensor(experts), counts_RC.device)
    over_R = counts_RC.amax(-1).double() * many / slots_R.clamp(min=1) - 1
    return (over_R.where(slots_R > 0, 0).sum(), (slots_R > 0).sum(), stats.dropped.sum(),
            stats.entropy_sum.sum())


def loss_metrics(terms: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Contribution of every auxiliary loss to `loss/total`, and its value without the weight.

    The value of the balance loss is not among them. `balance_metrics` computes it from the pooled counts of
    the step, whatever scope and mode it was trained on.
    """
    return {**{f"loss/weighted/{name}": term for name, term in terms.items()},
            **{f"loss/{name}": term / weights[name] for name, term in terms.items() if name != "balance"}}


def balance_metrics(sums: StepSums, routers: Mapping[str, int],
                    experts: Mapping[str, int]) -> dict[str, float]:
    """Metrics of routing from the pooled sums of the step.

    They do not depend on the balance mode, the mesh or the split into micro-batches. Two exceptions depend on
    mesh and split: `moe/local_max_violation/mean`, and the drops of a capacity whose scope is a micro-batch.

    Args:
        sums: sums of the step.
        routers: number of choices by router, in run order.
        experts: number of experts by router.
    """
    if not routers:
        return {}
    counts, numbers = by_stack(sums.counts_L.double(), routers), iter(experts.values())
    of = [_balance(counts_RC, prob_sums_RC, [next(numbers) for _ in counts_RC])
          for counts_RC, prob_sums_RC in zip(counts, by_stack(sums.prob_sums_L, routers))]
    balance_R, violation_R, slots_R, dead_R = (torch.cat(parts) for parts in zip(*of))
    balance, violation, slots, dead = torch.stack([balance_R, violation_R, slots_R, dead_R]).sum(-1).tolist()
    return {
        "loss/balance": balance / len(routers) / max(1, sums.tokens),
        "moe/max_violation/mean": violation / len(routers),
        "moe/max_violation/max": violation_R.max().item(),
        "moe/local_max_violation/mean": sums.violation / max(1.0, sums.violations),
        "moe/entropy": sums.entropy / max(1, len(routers) * sums.tokens),
        "moe/active_experts": slots / (len(routers) * max(1, sums.tokens)),
        "moe/dead_experts": int(dead),
        "moe/drop_fraction": sums.dropped / max(1.0, slots),
    }


def _balance(counts_RC: Tensor, prob_sums_RC: Tensor,
             experts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Balance of each router of a stack.

    Args:
        counts_RC: float64 [R, C], pooled counts of the step.
        prob_sums_RC: float64 [R, C], probabilities summed over tokens.
        experts: number of experts of each router.

    Returns:
        Four tensors [R]: C sum_i f_i P_i times tokens, over all choices; and, of the experts alone, max
        violation, slots, and experts without a slot.
    """
    share_R = counts_RC.shape[-1] / counts_RC.sum(-1).clamp(min=1)       # 1 / mean load of a choice
    loads_RC, experts_R = only_experts(counts_RC, experts), torch.tensor(experts)
    slots_R = loads_RC.sum(-1)
    violation_R = slots_R.clamp(min=1).reciprocal() * experts_R * loads_RC.amax(-1) - (slots_R > 0).double()
    return (share_R * (counts_RC * prob_sums_RC).sum(-1), violation_R, slots_R,
            experts_R - (loads_RC > 0).sum(-1).double())


def forecast_metrics(errors_permille: Sequence[int]) -> dict[str, float]:
    """Mean and maximum, over banks, of the error of this step's load forecasts (plan/loads/forecast.py)."""
    errors = [int(error) / 1000 for error in errors_permille] or [0.0]
    return {"moe/forecast_error/mean": sum(errors) / len(errors), "moe/forecast_error/max": max(errors)}
