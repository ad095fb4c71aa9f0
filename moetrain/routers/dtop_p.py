"""Top-p routing with a threshold that follows a target: DTop-p (Jin et al. 2025, arXiv 2512.13996).

    choice and gate weights   those of routers/top_p.py, at a threshold P that all layers share
    after every step          e = (k - mean k) / E, mean k: experts of a token, over all tokens and layers
                              P <- clip(P + gain_p (e - e') + gain_i e, 1/E, 1)   (e': the error before)

This is the proportional-integral controller P = P_0 + gain_p e + gain_i sum(e), written for its changes:
where P is clipped, no sum of errors winds up, and P leaves the bound as soon as the error turns.

Of the paper, the abstract was at hand: one threshold for all layers, moved by a proportional-integral
controller so that the experts in use meet a target. The gains and the unit of the error are ours. Its
normalization of each layer's logits is not here. The errors are computed from counts of the whole step, so P
has the same bits on every rank, mesh and split of the batch.

Shapes: E experts, C choices (experts alone, here).
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from moetrain.ops.start import Start, constant
from moetrain.routers.top_p import TopPRouter


class DTopPRouter(TopPRouter):
    """Top-p router whose threshold is moved until a token takes a given number of experts in the mean.

    Args:
        dim: D.
        num_experts: E.
        top_k: experts of a token to aim at, unless `target_k` says otherwise.
        p: the threshold before the first step.
        target_k: experts of a token to aim at, in the mean over tokens and layers; null is model.top_k.
        gain_p: what a change of the error, as a share of the experts, moves the threshold.
        gain_i: what the error moves the threshold, in every step.
        k_min: experts that a token takes at least.
        k_max: experts that a token takes at most; null: all of them.
    """

    BOUNDS = {"target_k": "1 or more", "gain_p": "0 or more", "gain_i": "above 0"}
    START_ARGUMENTS = ("p",)
    MEAN_EXPERTS = "target_k or K"
    BY_TOKENS = True

    def __init__(self, *, dim: int, num_experts: int, top_k: int, p: float = 0.4,
                 target_k: float | None = None, gain_p: float = 0.1, gain_i: float = 0.05, k_min: int = 1,
                 k_max: int | None = None) -> None:
        super().__init__(dim=dim, num_experts=num_experts, p=p, k_min=k_min, k_max=k_max)
        self.target_k = top_k if target_k is None else target_k
        assert k_min <= self.target_k <= self.top_k, (k_min, self.target_k, self.top_k)
        self.gain_p, self.gain_i = gain_p, gain_i
        self.register_buffer("common_p", torch.empty(1))
        self.register_buffer("error", torch.empty(1))

    def starts(self) -> dict[str, Start]:
        return {**super().starts(), "common_p": constant(self.p), "error": constant(0)}

    @property
    def threshold(self) -> float | Tensor:
        """The threshold of this step; infinity, which takes all experts, from 1 on."""
        return self.common_p.where(self.common_p < 1, torch.inf)

    @classmethod
    @torch.no_grad()
    def end_of_step_together(cls, routers: Sequence[Self], counts: Sequence[Tensor], tokens: int) -> None:
        """Move the threshold of all layers by the error of their mean."""
        errors = [(router.target_k * tokens - counts_E.sum().double()) / (router.num_experts * max(1, tokens))
                  for router, counts_E in zip(routers, counts)]
        error, least = torch.stack(errors).mean(), 1 / max(router.num_experts for router in routers)
        for router in dict.fromkeys(routers):
            now = error.to(router.error.dtype)
            move = router.gain_p * (now - router.error) + router.gain_i * now
            router.common_p.add_(move).clamp_(least, 1)
            router.error.copy_(now)
