"""Balance over groups of experts: DeepSeekMoE's device balance, DeepSeek-V2's communication balance.

With G equal groups of consecutive experts, n_i slots of expert i and P_i its mean probability:

    device           sum_g f_g P_g     f_g = mean over the group of E n_i / sum n          arXiv 2401.06066
    communication    sum_g f_g P_g     f_g = G / (M N) * tokens sent to the group          arXiv 2405.04434
                                       P_g = sum over the group of P_i, in both

Both are 1 for perfect balance. With one group the device loss is constant, with a group for each expert it is
the balance loss of single experts. M is the number of groups to which the router limits a token
(`router.topk_groups`); a token in fewer groups counts less, as in the paper.

A group is a device where num_groups = parallel.ep and experts stay at their homes. The loss itself goes by
ids, never by the mesh, so it is the same on any.

As the balance loss, both are linear in the probability sums, and f has no gradient. The papers count over a
batch; here the scope says over what (losses/load_balance.py).

Shapes: E experts, G groups, R routers of a stack.
"""

from collections.abc import Mapping
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from moetrain.errors import ConfigError
from moetrain.losses.base import Pooled
from moetrain.losses.load_balance import balance_slope
from moetrain.losses.scoped import ScopedLoss
from moetrain.ops.router_sums import Decided, TokenSum
from moetrain.routers.base import RoutingStats


class DeviceBalanceLoss(ScopedLoss):
    """Device-level balance loss: slots per group of experts.

    Args:
        num_groups: G; divides the number of experts.
        weight: coefficient in the objective; DeepSeekMoE's a2.
        scope: what slots are counted over: global, node or micro (a micro-batch of a rank).
        mode: with scope global or node, how counts are pooled under accumulation (losses/base.py).
        reduction: mean or sum over routers.
    """

    BOUNDS = {"num_groups": "1 or more", "weight": "0 or more"}

    def __init__(self, *, num_groups: int = 4, weight: float = 0.05,
                 scope: Literal["global", "node", "micro"] = "global",
                 mode: Literal["exact", "sync", "buffer", "warm"] = "exact",
                 reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(weight=weight, scope=scope, mode=mode, reduction=reduction)
        self.num_groups = num_groups

    def value(self, stats: RoutingStats, pooled: Pooled) -> Tensor:
        """Contribution of a micro-batch to the loss of each router, [R], with gradient."""
        return (self.slopes(stats, pooled)["prob_sum_E"] * stats.prob_sum_E).sum(-1)

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        """Gradient of `value` at the probability sums, [R, E]: f of an expert's group, over N."""
        counts_E = stats.counts_E if self.scope == "micro" else pooled.counts_E
        slope_E = balance_slope(counts_E, pooled.tokens, stats.prob_sum_E.dtype)
        mean_G = slope_E.unflatten(-1, (self.num_groups, self.group_size(slope_E.shape[-1]))).mean(-1)
        return {"prob_sum_E": mean_G.repeat_interleave(slope_E.shape[-1] // self.num_groups, -1)}

    def group_size(self, choices: int) -> int:
        """Choices of a group. ConfigError where groups do not divide what a router chooses from."""
        if choices % self.num_groups:                        # of experts alone: config/rules/losses.py
            raise ConfigError(
                271, f"num_groups={self.num_groups} of a balance loss does not divide {choices} choices",
                where="loss.*.num_groups, router._target_",
                why="groups are equal, and choices that are no experts are counted with these",
                next=f"num_groups={max(g for g in range(1, self.num_groups) if choices % g == 0)}")
        return choices // self.num_groups


class CommunicationBalanceLoss(DeviceBalanceLoss):
    """Communication balance loss: tokens sent to each group, each once however many of its experts it takes.

    Args:
        num_groups: G; divides the number of experts.
        max_groups: M, groups to which a token is sent at most.
        weight: coefficient in the objective; DeepSeek-V2's a3.
        scope: what tokens are counted over: global, node or micro (a micro-batch of a rank).
        mode: with scope global or node, how counts are pooled under accumulation (losses/base.py).
        reduction: mean or sum over routers.
    """

    BOUNDS = {"num_groups": "1 or more", "max_groups": "1 or more", "weight": "0 or more"}

    def __init__(self, *, num_groups: int = 4, max_groups: int = 2, weight: float = 0.02,
                 scope: Literal["global", "node", "micro"] = "global",
                 mode: Literal["exact", "sync", "buffer"] = "exact",
                 reduction: Literal["mean", "sum"] = "mean") -> None:
        self.max_groups, self.sum_name = max_groups, f"sent_{num_groups}"
        self.token_sums = {self.sum_name: sent_to_groups(num_groups)}
        self.summed = frozenset({self.sum_name, "tokens"})
        super().__init__(num_groups=num_groups, weight=weight, scope=scope, mode=mode, reduction=reduction)

    def slopes(self, stats: RoutingStats, pooled: Pooled) -> dict[str, Tensor]:
        """Gradient of `value` at the probability sums, [R, E]: f of an expert's group, over N."""
        dtype, size = stats.prob_sum_E.dtype, self.group_size(stats.prob_sum_E.shape[-1])
        counted_G = self.over_scope(stats, pooled, self.sum_name).to(dtype)
        of_R = self.over_scope(stats, pooled, "tokens").to(dtype)
        f_G = self.num_groups / self.max_groups * counted_G / of_R.clamp(min=1)[..., None]
        slope_G = f_G / pooled.tokens.clamp(min=1).to(dtype)
        return {"prob_sum_E": slope_G.repeat_interleave(size, -1)}

    def metrics(self, sums: Mapping[str, Mapping[str, Tensor]], tokens: int) -> dict[str, float]:
        """Groups to which a token is sent, the mean over tokens and routers."""
        sent = [counts_G.sum().item() for counts_G in sums[self.sum_name].values()]
        return {"moe/groups_per_token": sum(sent) / len(sent) / max(1, tokens)}


@cache
def sent_to_groups(num_groups: int) -> TokenSum:
    """Make the sum that counts the tokens sent to each group, int64 [G]. One function for each number."""

    def sent(decided: Decided) -> Tensor:
        size = max(1, decided.probs_TC.shape[1] // num_groups)
        groups_TK = decided.ids_TK.where(decided.ids_TK < 0, decided.ids_TK // size)
        groups_G = torch.arange(num_groups, device=groups_TK.device)
        return (groups_TK[:, :, None] == groups_G).any(1).sum(0)

    return sent
