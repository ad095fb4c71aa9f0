"""The discrete part of routing: which experts a token chooses.

    top_k             a token's k largest scores, stably ordered: score descending, then expert id ascending
    largest           their ids; -1 where a score is -inf
    used_first        the unused slots of a token at the end
    in_steps          weights of different tokens, so that rounding does not decide between them
    decide            identity through which every decision passes, so that it is made once in a step
    keep_best_groups  scores outside a token's best groups of experts become -inf
    gather_weights    gate weights at the decided ids
    shares            the same over their sum
    equal_shares      equal ones for the used slots
    of_experts        the slots of experts alone, where there are other choices

`torch.topk` promises no order between ties, and CPU and CUDA disagree there; so `top_k` sorts. Activation
checkpointing saves the results of the ops `decide` and `top_k` and replays them in recomputation
(model/activation_checkpointing.py): a choice is never made twice in a step, and scores are not even sorted
again. `gather_weights` reads the probabilities at the decided ids, so that gate weights keep their graph.

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
    """Fix the expert ids [T, K] for this step: recomputation replays them."""
    return _decide(ids_TK)


def top_k(scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest scores of each row and their ids, [T, k]; ties go to the lower id. No gradient."""
    return _top_k(scores_TE.detach(), k)


def largest(scores_TE: Tensor, k: int) -> Tensor:
    """Choose the ids of the k largest scores of each row, int64 [T, k]; -1 for a score of -inf."""
    values_TK, ids_TK = top_k(scores_TE, k)
    return ids_TK.where(values_TK != float("-inf"), -1)


def used_first(ids_TK: Tensor) -> Tensor:
    """Move the unused slots of each token to the end; the others keep their order."""
    return ids_TK.gather(1, order_used_first(ids_TK))


def order_used_first(ids_TK: Tensor) -> Tensor:
    """Order the slots of each token: used ones first, as they stand, then those with id -1; int64 [T, K]."""
    return (ids_TK < 0).to(torch.uint8).argsort(dim=1, stable=True)


def in_steps(weights: Tensor) -> Tensor:
    """Round weights to steps of 2^-16 (2^-32 in float64), by which tokens that compete are compared.

    Where a sequence begins with one token several times, the weights of these tokens are equal up to
    rounding. Rounding differs with the split of the batch and must not decide.

    Args:
        weights: any shape.

    Returns:
        Numbers of steps, of the same shape and dtype.
    """
    return (weights * (2.0**32 if weights.dtype == torch.float64 else 2.0**16)).round()


def keep_best_groups(scores_TE: Tensor, num_groups: int, topk_groups: int, group_score: str) -> Tensor:
    """Set the scores outside each token's best groups of experts to -inf. No gradient.

    Of equal groups the first counts as better. The mask is -inf and not 0, because biased scores may be
    negative, and a 0 would outrank them.

    Args:
        scores_TE: scores [T, E], float32 or better; a group is E / num_groups consecutive experts.
        num_groups: number of groups.
        topk_groups: number of groups that a token keeps.
        group_score: "top2", the sum of a group's two best scores (DeepSeek-V3), or "max", its best
            (DeepSeek-V2).

    Returns:
        Scores [T, E] of the same dtype.
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
    """Gather probabilities at the ids [T, K]; 0 in unused slots. Differentiable in the probabilities."""
    used_TK = ids_TK >= 0
    return probs_TE.gather(1, ids_TK.clamp(min=0)).where(used_TK, probs_TE.new_zeros(()))


def shares(weights_TK: Tensor) -> Tensor:
    """Divide the gate weights [T, K] of each token by their sum; a row of padding stays 0."""
    return weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=1e-30)


def scatter_weights(weights_TK: Tensor, ids_TK: Tensor, num_experts: int) -> Tensor:
    """Scatter gate weights to their experts: the inverse of `gather_weights`. Differentiable in the weights.

    Args:
        weights_TK: gate weights [T, K].
        ids_TK: int64 [T, K], expert of each slot; -1 is unused.
        num_experts: E.

    Returns:
        Weights [T, E]; 0 where an expert was not chosen.
    """
    columns_TK = ids_TK.where(ids_TK >= 0, num_experts)              # an extra column takes the unused slots
    empty_TE = weights_TK.new_zeros(len(ids_TK), num_experts + 1)
    return empty_TE.scatter(1, columns_TK, weights_TK)[:, :num_experts]


def equal_shares(ids_TK: Tensor) -> Tensor:
    """Share 1 equally among the used slots of each token: float64 [T, K]."""
    used_TK = (ids_TK >= 0).double()
    return used_TK / used_TK.sum(-1, keepdim=True).clamp(min=1)


def of_experts(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Keep the slots of experts, used ones first; slots of other choices become unused, with weight 0."""
    ids_TK = ids_TK.where(ids_TK < num_experts, -1)
    order_TK = order_used_first(ids_TK)
    ids_TK = ids_TK.gather(1, order_TK)
    return ids_TK, weights_TK.gather(1, order_TK).where(ids_TK >= 0, 0)
