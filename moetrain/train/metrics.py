"""The numbers of a step, from sums that were added over micro-batches and ranks.

Two buffers travel: the pooled counts, int64 and exact, before the first backward; and one float64 buffer of everything
else (`StepSums`) after the last. Names and meanings of the metrics: docs/reference/files.md.
"""

import resource
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm.mesh import Group
from moetrain.comm.reduce import sum_over
from moetrain.losses.base import Pooled
from moetrain.losses.load_balance import balance_slope
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
        counts = [stats[router].counts_E for router in self.routers]
        found = torch.stack([max_violation(counts_E) for counts_E in counts]) if counts else self.flat[:0]
        dropped, entropy = (sum((getattr(stats[router], field) for router in self.routers), self.flat.new_zeros(()))
                            for field in ("dropped", "entropy_sum"))
        head = torch.stack([cross_entropy.double(), total.double(), found.sum(), _count_routed(counts, self.flat), dropped,
                            entropy, self.flat.new_ones(())])
        self.flat += torch.cat([head, *(stats[router].prob_sum_E.double() for router in self.routers),
                                *(lean(stats[router].counts_E).double() for router in self.leaning)])

    def sum_over(self, group: Group) -> StepSums:
        head, prob_sums, leans, votes = sum_over(group, torch.cat([self.flat, self.votes])).split([*self.sizes, len(self.votes)])
        *sums, micro_batches = head.tolist()
        return StepSums(*sums, split_by_router(prob_sums, self.routers), split_by_router(leans / micro_batches, self.leaning),
                        votes.tolist())


def max_violation(counts_E: Tensor) -> Tensor:
    """max load / mean load - 1, float64; 0 when nothing was routed."""
    mean = counts_E.double().mean()
    return torch.where(mean > 0, counts_E.max() / mean.clamp(min=1e-300) - 1, 0.0)


def balance_metrics(counts: Mapping[str, Tensor], sums: StepSums, tokens: int) -> dict[str, float]:
    """Metrics of routing from the pooled sums of the step: independent of mode, mesh and split."""
    if not counts:
        return {}
    n = torch.tensor(tokens)
    balance = [(balance_slope(c, n, torch.float64) * sums.prob_sums[name]).sum() for name, c in counts.items()]
    violation = torch.stack([max_violation(c) for c in counts.values()])
    return {
        "loss/balance": torch.stack(balance).mean().item(),
        "moe/max_violation/mean": violation.mean().item(),
        "moe/max_violation/max": violation.max().item(),
        "moe/local_max_violation/mean": sums.violation / max(1.0, sums.violations),
        "moe/entropy": sums.entropy / max(1, len(counts) * tokens),
        "moe/dead_experts": sum(int((c == 0).sum()) for c in counts.values()),
        "moe/drop_fraction": sums.dropped / max(1, sum(int(c.sum()) for c in counts.values())),
    }


def forecast_metrics(errors_permille: Sequence[int]) -> dict[str, float]:
    """How far the forecasts of this step's loads were off, by router (plan/forecast.py)."""
    errors = [int(error) / 1000 for error in errors_permille] or [0.0]
    return {"moe/forecast_error/mean": sum(errors) / len(errors), "moe/forecast_error/max": max(errors)}


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process held on the device (CPU: resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _count_routed(counts: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack([(c.sum() > 0).double() for c in counts]).sum() if counts else like.new_zeros(())
