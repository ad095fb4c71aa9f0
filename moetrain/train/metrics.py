"""The numbers of a step, from sums that were added over micro-batches and ranks.

Two buffers travel: the pooled counts, int64 and exact, before the first backward; and one float64 buffer of everything
else (`StepSums`) after the last. Names and meanings of the metrics: docs/reference/files.md.
"""

import resource
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.reduce import sum_over
from moetrain.losses.base import Pooled
from moetrain.routers.base import RoutingStats, lean


class StepSums(NamedTuple):
    """Summed over micro-batches and ranks; float64."""

    cross_entropy: float
    total: float                             # the loss itself: contributions of all micro-batches
    violation: float                         # max violation inside micro-batches, added up over routers
    violations: float                        # how many were added
    dropped: float                           # slots dropped by a capacity policy, all routers together
    entropy: float                           # of the routers' probabilities, nats, over tokens and routers
    prob_sums: dict[str, Tensor]             # per router [E]
    leans: dict[str, Tensor]                 # of routers that want them (routers/base.py), the mean over micro-batches [E]
    votes: list[float]                       # those of train/step.py, on their way with the rest


HEAD = 7                                     # numbers of a SumBuffer before those of the routers


def flat_counts(outputs: list[Mapping[str, RoutingStats]], routers: Mapping[str, int], device: torch.device) -> Tensor:
    """Counts of all routers of all micro-batches in one int64 buffer [sum of E]."""
    total = torch.zeros(sum(routers.values()), dtype=torch.int64, device=device)
    for stats in outputs:
        if stats:
            total += torch.cat([stats[router].counts_E for router in routers])
    return total


def split_by_router(flat: Tensor, routers: Mapping[str, int]) -> dict[str, Tensor]:
    return dict(zip(routers, flat.split(list(routers.values()))))


def pool(flat: Tensor, routers: Mapping[str, int], tokens: Tensor) -> dict[str, Pooled]:
    """The argument of the losses, by router."""
    return {name: Pooled(counts_E, tokens) for name, counts_E in split_by_router(flat, routers).items()}


class SumBuffer:
    """Collects the float64 sums of a step on this rank, then adds them over the ranks in one collective."""

    def __init__(self, routers: Mapping[str, int], device: torch.device, votes: Sequence[int] = (),
                 leaning: Sequence[str] = ()) -> None:
        """leaning: routers whose leans are wanted."""
        self.routers, self.leaning = routers, {router: routers[router] for router in leaning}
        self.votes = torch.tensor(votes, dtype=torch.float64, device=device)
        self.sizes = [HEAD, sum(routers.values()), sum(self.leaning.values())]
        self.flat = torch.zeros(sum(self.sizes), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, cross_entropy: Tensor, total: Tensor, stats: Mapping[str, RoutingStats]) -> None:
        of = [stats[router] for router in self.routers]
        found, routed = _violations(of) if of else (self.flat[:0], self.flat[:0])
        dropped, entropy = (torch.stack([getattr(part, field) for part in of]).sum() if of else self.flat.new_zeros(())
                            for field in ("dropped", "entropy_sum"))
        head = torch.stack([cross_entropy.double(), total.double(), found.sum(), routed.sum(), dropped, entropy,
                            self.flat.new_ones(())])
        self.flat += torch.cat([head, *(stats[router].prob_sum_E.double() for router in self.routers),
                                *(lean(stats[router].counts_E).double() for router in self.leaning)])

    def sum_over(self, group: Group) -> StepSums:
        head, prob_sums, leans, votes = sum_over(group, torch.cat([self.flat, self.votes])).split([*self.sizes, len(self.votes)])
        *sums, micro_batches = head.tolist()
        return StepSums(*sums, split_by_router(prob_sums, self.routers), split_by_router(leans / micro_batches, self.leaning),
                        votes.tolist())


def _violations(stats: list[RoutingStats]) -> tuple[Tensor, Tensor]:
    """Of every router of a micro-batch max load / mean load - 1, float64, 0 when nothing was routed; and whether anything was."""
    largest = torch.stack([part.counts_E.max() for part in stats]).double()
    slots = torch.stack([part.active_sum for part in stats])
    experts = largest.new_tensor([len(part.counts_E) for part in stats])
    return (largest * experts / slots.clamp(min=1) - 1).where(slots > 0, 0), slots > 0


def balance_metrics(counts: Mapping[str, Tensor], sums: StepSums, tokens: int) -> dict[str, float]:
    """Metrics of routing from the pooled sums of the step: independent of mode, mesh and split."""
    if not counts:
        return {}
    loads = _on_host(counts)
    slots = np.array([n_E.sum() for n_E in loads])
    share = np.array([len(n_E) for n_E in loads]) / slots.clip(min=1)        # of a slot, over that of the mean load
    balance = [of_slot * n_E @ p_E / max(1, tokens) for of_slot, n_E, p_E in zip(share, loads, _on_host(sums.prob_sums))]
    violation = share * [n_E.max() for n_E in loads] - (slots > 0)
    return {
        "loss/balance": float(np.mean(balance)),
        "moe/max_violation/mean": float(violation.mean()),
        "moe/max_violation/max": float(violation.max()),
        "moe/local_max_violation/mean": sums.violation / max(1.0, sums.violations),
        "moe/entropy": sums.entropy / max(1, len(counts) * tokens),
        "moe/dead_experts": sum(int((n_E == 0).sum()) for n_E in loads),
        "moe/drop_fraction": sums.dropped / max(1, int(slots.sum())),
    }


def _on_host(parts: Mapping[str, Tensor]) -> list[np.ndarray]:
    """Of every router, in one copy."""
    flat = torch.cat(list(parts.values())).cpu().numpy()
    return np.split(flat, np.cumsum([len(part) for part in parts.values()])[:-1])


def forecast_metrics(errors_permille: Sequence[int]) -> dict[str, float]:
    """How far the forecasts of this step's loads were off, by router (plan/forecast.py)."""
    errors = [int(error) / 1000 for error in errors_permille] or [0.0]
    return {"moe/forecast_error/mean": sum(errors) / len(errors), "moe/forecast_error/max": max(errors)}


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process held on the device (CPU: resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
