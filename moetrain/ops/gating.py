"""The discrete part of routing: choosing experts.

`top_k` is the stable selection (score descending, then expert id ascending) that routers use; `torch.topk` promises no
order between ties, and CPU and CUDA disagree there. `decide` is the one op through which every decision passes: the
identity, which activation checkpointing saves and replays (model/activation_checkpointing.py), so that a choice is never made twice in a
step. It saves what `top_k` found too, so that not even the sorting is done again.
`gather_weights` takes the gate weights at the *decided* ids, so they keep their graph.

Shapes: T tokens, E experts, K slots. An unused slot has id -1 and weight 0.
"""

import torch
from torch import Tensor

from moetrain.ops.extension import define


def _sorted_first(scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    sorted_TE, ids_TE = scores_TE.sort(dim=-1, descending=True, stable=True)
    return sorted_TE[:, :k].contiguous(), ids_TE[:, :k].contiguous()


_top_k = define("top_k(Tensor scores_TE, int k) -> (Tensor, Tensor)", reference=_sorted_first)
_decide = define("decide(Tensor ids_TK) -> Tensor", reference=lambda ids_TK: ids_TK.clone())


def decide(ids_TK: Tensor) -> Tensor:
    """The decided expert ids [T, K]: what comes after this op never changes within a step."""
    return _decide(ids_TK)


def top_k(scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Largest k scores of each row and their ids, both [T, k]; ties go to the lower id. No gradient."""
    return _top_k(scores_TE.detach(), k)


def keep_best_groups(scores_TE: Tensor, num_groups: int, topk_groups: int, group_score: str) -> Tensor:
    """The scores with -inf outside each token's `topk_groups` best groups of consecutive experts. No gradient.

    group_score: top2, the sum of a group's two best scores (DeepSeek-V3); max, its best (DeepSeek-V2). Of equal groups
    the first counts as better. The mask is -inf and not 0: biased scores may be negative, and a 0 would outrank them.
    """
    assert group_score in ("top2", "max"), group_score
    scores_TE = scores_TE.detach()
    if topk_groups == num_groups:
        return scores_TE
    scores_TGe = scores_TE.unflatten(1, (num_groups, scores_TE.shape[1] // num_groups))
    best = 1 if group_score == "max" else min(2, scores_TGe.shape[2])
    groups_TG = scores_TGe.topk(best, dim=-1).values.sum(-1)
    _, kept_TK = top_k(groups_TG, topk_groups)
    kept_TG = torch.zeros_like(groups_TG, dtype=torch.bool).scatter(1, kept_TK, True)
    return scores_TGe.where(kept_TG[:, :, None], float("-inf")).flatten(1)


def gather_weights(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Entries of probs at the ids [T, K], 0 in unused slots; differentiable in probs."""
    used_TK = ids_TK >= 0
    return probs_TE.gather(1, ids_TK.clamp(min=0)).where(used_TK, probs_TE.new_zeros(()))


def scatter_weights(weights_TK: Tensor, ids_TK: Tensor, num_experts: int) -> Tensor:
    """Weights by expert [T, E], 0 where an expert was not chosen: the inverse of `gather_weights`; differentiable."""
    columns_TK = ids_TK.where(ids_TK >= 0, num_experts)              # one more column takes the unused slots
    return weights_TK.new_zeros(len(ids_TK), num_experts + 1).scatter(1, columns_TK, weights_TK)[:, :num_experts]
