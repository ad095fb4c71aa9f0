"""The numbers of a step, from sums that were added over micro-batches and ranks.

Two buffers travel: the pooled counts, int64 and exact, before the first backward; and one float64 buffer of
everything else (`StepSums`) after the last. Names and meanings of the metrics: docs/reference/files.md.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.reduce import sum_over
from moetrain.losses.base import Pooled
from moetrain.ops.pinned import to_device
from moetrain.routers.base import RoutingStats, Stack, by_stack, load_error_sign
from moetrain.train.objective import LossShare


class StepSums(NamedTuple):
    """Summed over micro-batches and ranks; float64, on the host but for `load_error_signs`."""

    cross_entropy: float
    total: float                             # the loss itself: contributions of all micro-batches
    violation: float                         # max violation inside micro-batches, added up over routers
    violations: float                        # how many were added
    dropped: float                           # slots dropped by a capacity policy, all routers together
    entropy: float                           # of the routers' probabilities, nats, over tokens and routers
    terms: dict[str, float]                  # what every auxiliary loss adds to `total`, by name
    prob_sums_L: Tensor                      # of all routers, flat
    counts_L: Tensor                         # of all routers, flat; int64
    tokens: int
    norm: float                              # of all gradients
    load_error_signs: dict[str, Tensor]                 # of routers that want them (routers/base.py), the mean over micro-batches [E], on the device
    flags: list[float]                       # those of train/step.py, on their way with the rest
    phases: list[list[float]]                # seconds of every rank (train/loggers/stopwatch.py)


HEAD = 7                                     # numbers of a SumBuffer before those of the losses and routers


def flat_counts(stacks: Sequence[Stack], device: torch.device) -> Tensor:
    """Counts of all routers of a micro-batch in one int64 buffer [sum of E]."""
    parts = [stack.stats.counts_E.flatten() for stack in stacks]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)


def split_by_router(flat: Tensor, routers: Mapping[str, int]) -> dict[str, Tensor]:
    return dict(zip(routers, flat.split(list(routers.values()))))


def pool(flat_L: Tensor, routers: Mapping[str, int], tokens: Tensor) -> list[Pooled]:
    """The argument of the losses, for every stack."""
    return [Pooled(counts_RE, tokens) for counts_RE in by_stack(flat_L, routers)]


class SumBuffer:
    """Collects the float64 sums of a step on this rank, then adds them over the ranks in one collective."""

    def __init__(self, routers: Mapping[str, int], device: torch.device, flags: Sequence[int] = (),
                 routers_needing_load_error: Sequence[str] = (), losses: Sequence[str] = ()) -> None:
        """Args:
            routers: experts by router name.
            device: of the sums.
            flags: of this rank, to be summed beside them.
            routers_needing_load_error: names of the routers for which signs of load errors are averaged.
            losses: names of the auxiliary losses that are trained on.
        """
        self.routers, self.routers_needing_load_error, self.losses = routers, {router: routers[router] for router in routers_needing_load_error}, tuple(losses)
        self.flags = torch.tensor(flags, dtype=torch.float64)
        self.sizes = [HEAD, len(self.losses), sum(routers.values()), sum(self.routers_needing_load_error.values())]
        self.flat = torch.zeros(sum(self.sizes), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, cross_entropy: Tensor, share: LossShare, stacks: Sequence[Stack]) -> None:
        zero = self.flat.new_zeros(())
        terms = (share.terms.get(name, zero).double() for name in self.losses)
        head = torch.stack([cross_entropy.double(), share.total.double(), *self._of_routers(stacks), self.flat.new_ones(()), *terms])
        load_error_signs = (sign_E for stack in stacks if self.routers_needing_load_error for router, sign_E in zip(stack.routers, load_error_sign(stack.stats.counts_E))
                 if router in self.routers_needing_load_error)
        self.flat += torch.cat([head, *(stack.stats.prob_sum_E.flatten() for stack in stacks), *load_error_signs])

    def _of_routers(self, stacks: Sequence[Stack]) -> list[Tensor]:
        """Violations, how many of them, dropped slots, entropy."""
        if not stacks:
            return [self.flat.new_zeros(())] * 4
        of = [_summed(stack.stats) for stack in stacks]
        return [sum(rest, first).double() for first, *rest in zip(*of)]

    def sum_over(self, group: Group, phases: Sequence[float], counts_L: Tensor, tokens: Tensor, norm: Tensor) -> StepSums:
        """The sums over the group, and what else of a step the host wants to know. Here, once a step, it
        waits for the device.

        Args: group: the ranks with different tokens. phases: seconds of this rank. In a sum every rank fills
            a row of its own, so that all of them are known. counts_L: int64, pooled over the group already;
            exact in float64. tokens: int64 scalar, pooled too. norm: scalar, of all gradients.
        """
        times = torch.zeros(group.size, len(phases), dtype=torch.float64)
        times[group.position] = torch.tensor(phases, dtype=torch.float64)
        told = to_device(torch.cat([self.flags, times.flatten()]), self.flat.device)
        summed = sum_over(group, torch.cat([self.flat, told]))
        read = torch.cat([summed, counts_L.double(), tokens.double().view(1), norm.double().view(1)]).cpu()
        head, terms, prob_sums, _, flags, times, counts, (tokens, norm) = read.split(
            [*self.sizes, len(self.flags), times.numel(), len(counts_L), 2])
        *sums, micro_batches = head.tolist()
        load_error_signs = summed[sum(self.sizes[:-1]):sum(self.sizes)] / micro_batches
        return StepSums(*sums, dict(zip(self.losses, terms.tolist())), prob_sums, counts.long(), int(tokens), float(norm),
                        split_by_router(load_error_signs, self.routers_needing_load_error), flags.tolist(), times.view(group.size, -1).tolist())


def _summed(stats: RoutingStats) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over the routers of a stack: max load / mean load - 1, float64, 0 where nothing was routed; where
    anything was; dropped slots; entropy.
    """
    slots_R = stats.active_sum
    over_R = stats.counts_E.amax(-1).double() * stats.counts_E.shape[-1] / slots_R.clamp(min=1) - 1
    return over_R.where(slots_R > 0, 0).sum(), (slots_R > 0).sum(), stats.dropped.sum(), stats.entropy_sum.sum()


def loss_metrics(terms: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """What every auxiliary loss adds to loss/total, and its value without the weight.

    The balance loss has no value here: that is reported from the pooled counts of the step
    (`balance_metrics`), whatever its scope and mode trained on.
    """
    return {**{f"loss/weighted/{name}": term for name, term in terms.items()},
            **{f"loss/{name}": term / weights[name] for name, term in terms.items() if name != "balance"}}


def balance_metrics(sums: StepSums, routers: Mapping[str, int]) -> dict[str, float]:
    """Metrics of routing from the pooled sums of the step: independent of mode, mesh and split."""
    if not routers:
        return {}
    of = [_balance(*parts) for parts in zip(by_stack(sums.counts_L.double(), routers), by_stack(sums.prob_sums_L, routers))]
    balance_R, violation_R, slots_R, dead_R = (torch.cat(parts) for parts in zip(*of))
    balance, violation, slots, dead = torch.stack([balance_R, violation_R, slots_R, dead_R]).sum(-1).tolist()
    return {
        "loss/balance": balance / len(routers) / max(1, sums.tokens),
        "moe/max_violation/mean": violation / len(routers),
        "moe/max_violation/max": violation_R.max().item(),
        "moe/local_max_violation/mean": sums.violation / max(1.0, sums.violations),
        "moe/entropy": sums.entropy / max(1, len(routers) * sums.tokens),
        "moe/dead_experts": int(dead),
        "moe/drop_fraction": sums.dropped / max(1.0, slots),
    }


def _balance(counts_RE: Tensor, prob_sums_RE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the routers of a stack, float64 [R]:

    E sum_i f_i P_i times tokens, max violation, slots, experts without any.
    """
    slots_R = counts_RE.sum(-1)
    share_R = counts_RE.shape[-1] / slots_R.clamp(min=1)     # of a slot, over that of the mean load
    violation_R = share_R * counts_RE.amax(-1) - (slots_R > 0).double()
    return share_R * (counts_RE * prob_sums_RE).sum(-1), violation_R, slots_R, (counts_RE == 0).sum(-1).double()


def forecast_metrics(errors_permille: Sequence[int]) -> dict[str, float]:
    """How far the forecasts of this step's loads were off, by router (plan/loads/forecast.py)."""
    errors = [int(error) / 1000 for error in errors_permille] or [0.0]
    return {"moe/forecast_error/mean": sum(errors) / len(errors), "moe/forecast_error/max": max(errors)}
