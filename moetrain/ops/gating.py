"""The discrete part of routing: choosing experts.

`top_k` is the stable selection (score descending, then expert id ascending) that routers use; `torch.topk` promises no
order between ties, and CPU and CUDA disagree there. `decide` is the one op through which every decision passes: the
identity, which activation checkpointing will save and replay, so that a choice is never made twice in a step.
`gather_weights` takes the gate weights at the *decided* ids, so they keep their graph.

Shapes: T tokens, E experts, K slots. An unused slot has id -1 and weight 0.
"""

import torch
from torch import Tensor

from moetrain.ops.extension import define

_decide = define("decide(Tensor ids_TK) -> Tensor", reference=lambda ids_TK: ids_TK.clone())


def decide(ids_TK: Tensor) -> Tensor:
    """The decided expert ids [T, K]: what comes after this op never changes within a step."""
    return _decide(ids_TK)


def top_k(scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Largest k scores of each row and their ids, both [T, k]; ties go to the lower id. No gradient."""
    scores_TE = scores_TE.detach()
    sorted_TE, ids_TE = scores_TE.sort(dim=-1, descending=True, stable=True)
    return sorted_TE[:, :k].contiguous(), ids_TE[:, :k].contiguous()


def gather_weights(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Entries of probs at the ids [T, K], 0 in unused slots; differentiable in probs."""
    used_TK = ids_TK >= 0
    return probs_TE.gather(1, ids_TK.clamp(min=0)).where(used_TK, probs_TE.new_zeros(()))


def count_choices(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Tokens per expert, int64 [E]; unused slots count nowhere."""
    return torch.bincount((ids_TK + 1).flatten(), minlength=num_experts + 1)[1:]
