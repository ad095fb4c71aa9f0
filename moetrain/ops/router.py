"""A router's choice, gate weights and sums as one op over its logits z [T, E], for devices with a kernel.

    s = softmax(z) or sigmoid(z);   the k largest of s + bias are chosen (inside the best groups)
    w = scale s[ids], or scale s[ids] / (sum of them);   p = s for softmax, s / (sum of s) for sigmoid
    sums over valid tokens: slots per expert, p per expert, lse^2 with lse = logsumexp(z), entropy of p

Backward takes the gradients of w, of the sums of p (the *slopes* of a balance loss), of lse^2 and of the
entropy:

    A_i = dL/ds_i through the weights,  Q_i = slope_i - dH (log p_i + 1)
    softmax   dz_i = p_i (A_i + Q_i - sum_j p_j (A_j + Q_j))                    + 2 dLSE lse p_i
    sigmoid   dz_i = s_i (1 - s_i) (A_i + (Q_i - sum_j p_j Q_j) / sum_j s_j)    + 2 dLSE lse softmax(z)_i

It computes the same numbers as the routers' own chains of operators (routers/topk.py, routers/sigmoid.py).
The CPU runs those, which are as fast there. With `ids` given nothing is chosen: weights and sums are those of
an earlier decision. Counts are returned, never accumulated.

Shapes: T tokens, E experts, K slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.extension import define, kernels_for
from moetrain.ops.gating import gather_weights, keep_best_groups, top_k
from moetrain.ops.router_sums import RouterSums, router_sums

SOFTMAX_FLOOR, SIGMOID_TINY = 1e-30, 1e-20               # as in routers/topk.py and routers/sigmoid.py
MAX_EXPERTS, MAX_SLOTS, MAX_GROUPS = 1024, 32, 32        # bounds of the kernel (csrc/router.cuh)


class RouterRule(NamedTuple):
    """How a router makes scores, chooses by them and makes gate weights of them."""

    slots: int                   # K
    sigmoid: bool = False        # scores; otherwise softmax
    renormalised: bool = True    # weights are divided by their sum
    scale: float = 1.0           # factor of the weights
    groups: int = 1              # this and the next two: keep_best_groups in ops/gating.py
    kept_groups: int = 1
    top2: bool = False


class Routed(NamedTuple):
    """Results of `route_tokens`."""

    ids_TK: Tensor               # int64, -1 in unused slots
    weights_TK: Tensor           # with gradient
    sums: RouterSums


def _scores(logits_TE: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor]:
    """Scores, and the probabilities that are summed."""
    if not sigmoid:
        probs_TE = logits_TE.softmax(-1)
        return probs_TE, probs_TE
    scores_TE = logits_TE.sigmoid()
    return scores_TE, scores_TE / (scores_TE.sum(-1, keepdim=True) + SIGMOID_TINY)


def _total(weights_TK: Tensor, sigmoid: bool) -> Tensor:
    """Sum of a token's weights, bounded away from 0."""
    total_T1 = weights_TK.sum(-1, keepdim=True)
    return total_T1 + SIGMOID_TINY if sigmoid else total_T1.clamp(min=SOFTMAX_FLOOR)


def _reference(logits_TE: Tensor, bias_E: Tensor | None, ids_TK: Tensor | None, valid_T: Tensor | None,
               slots: int, sigmoid: bool, renormalised: bool, scale: float, groups: int, kept_groups: int,
               top2: bool) -> tuple[Tensor, ...]:
    scores_TE, probs_TE = _scores(logits_TE, sigmoid)
    if ids_TK is None:
        biased_TE = scores_TE if bias_E is None else scores_TE + bias_E
        biased_TE = keep_best_groups(biased_TE, groups, kept_groups, "top2" if top2 else "max")
        ids_TK = top_k(biased_TE, slots)[1]
    ids_TK = ids_TK.clone() if valid_T is None else ids_TK.where(valid_T[:, None], -1)
    weights_TK = gather_weights(scores_TE, ids_TK)
    if renormalised:
        weights_TK = weights_TK / _total(weights_TK, sigmoid)
    lse_T = logits_TE.logsumexp(-1)
    if valid_T is not None:
        lse_T = lse_T.where(valid_T, 0)
    sums = router_sums(probs_TE, logits_TE, ids_TK, valid_T)
    return (scale * weights_TK, lse_T, sums.prob_sum_E, sums.lse2_sum, sums.entropy_sum, ids_TK,
            sums.counts_E.clone(), sums.tokens, sums.active_sum)


def _fake(logits_TE, bias_E, ids_TK, valid_T, slots, *rule):
    tokens, experts = logits_TE.shape
    real = [logits_TE.new_empty(shape) for shape in ((tokens, slots), (tokens,), (experts,), (), ())]
    whole = [logits_TE.new_empty(shape, dtype=torch.int64) for shape in ((tokens, slots), (experts,), (), ())]
    return (*real, *whole)


def _reference_backward(d_weights_TK: Tensor | None, slopes_E: Tensor | None, d_lse2: Tensor | None,
                        d_entropy: Tensor | None, logits_TE: Tensor, ids_TK: Tensor, lse_T: Tensor,
                        valid_T: Tensor | None, sigmoid: bool, renormalised: bool, scale: float) -> Tensor:
    if valid_T is not None:
        logits_TE = logits_TE.where(valid_T[:, None], 0)                 # padding may hold anything
    scores_TE, probs_TE = _scores(logits_TE, sigmoid)
    direct_TE = torch.zeros_like(scores_TE)
    if d_weights_TK is not None:
        used_TK = ids_TK >= 0
        d_weights_TK = (scale * d_weights_TK).where(used_TK, 0)
        if renormalised:
            chosen_TK = gather_weights(scores_TE, ids_TK)
            total_T1 = _total(chosen_TK, sigmoid)
            common_T1 = (d_weights_TK * chosen_TK).sum(-1, keepdim=True) / total_T1
            if not sigmoid:
                common_T1 = common_T1.where(chosen_TK.sum(-1, keepdim=True) >= SOFTMAX_FLOOR, 0)
            d_weights_TK = ((d_weights_TK - common_T1) / total_T1).where(used_TK, 0)
        direct_TE = direct_TE.scatter_add(1, ids_TK.clamp(min=0), d_weights_TK)
    through_TE = torch.zeros_like(scores_TE) if slopes_E is None else slopes_E.expand_as(scores_TE)
    if d_entropy is not None:
        through_TE = through_TE - (d_entropy * (probs_TE.log() + 1)).where(probs_TE != 0, 0)
    if not sigmoid:
        through_TE = through_TE + direct_TE
    through_TE = through_TE - (probs_TE * through_TE).sum(-1, keepdim=True)
    if sigmoid:
        d_scores_TE = direct_TE + through_TE / (scores_TE.sum(-1, keepdim=True) + SIGMOID_TINY)
        d_logits_TE = d_scores_TE * scores_TE * (1 - scores_TE)
    else:
        d_logits_TE = probs_TE * through_TE
    if d_lse2 is not None:
        softmax_TE = logits_TE.softmax(-1) if sigmoid else probs_TE
        d_logits_TE = d_logits_TE + (2 * d_lse2 * lse_T)[:, None] * softmax_TE
    return d_logits_TE if valid_T is None else d_logits_TE.where(valid_T[:, None], 0)


def _save(ctx, inputs, output) -> None:
    logits_TE, _, _, valid_T, _, *ctx.rule = inputs
    _, lse_T, _, _, _, *whole = output
    ctx.rule = ctx.rule[:3]                              # sigmoid, renormalised, scale
    ctx.mark_non_differentiable(lse_T, *whole)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_TE, whole[0], lse_T, valid_T)


def _gradients(ctx, d_weights_TK, _lse, slopes_E, d_lse2, d_entropy, *_whole):
    grads = (d_weights_TK, slopes_E, d_lse2, d_entropy)
    if all(grad is None for grad in grads):
        return (None,) * 11
    return (_backward(*grads, *ctx.saved_tensors, *ctx.rule), *(None,) * 10)


_RULE = "bool sigmoid, bool renormalised, float scale"
_backward = define(
    "router_backward(Tensor? d_weights_TK, Tensor? slopes_E, Tensor? d_lse2, Tensor? d_entropy, "
    f"Tensor logits_TE, Tensor ids_TK, Tensor lse_T, Tensor? valid_T, {_RULE}) -> Tensor",
    reference=_reference_backward,
    fake=lambda d_weights_TK, slopes_E, d_lse2, d_entropy, logits_TE, *rest: torch.empty_like(logits_TE),
)
_forward = define(
    f"router(Tensor logits_TE, Tensor? bias_E, Tensor? ids_TK, Tensor? valid_T, int slots, {_RULE}, "
    "int groups, int kept_groups, bool top2)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    backward=_gradients,
    setup_context=_save,
)


def kernel_takes(logits_TE: Tensor, rule: RouterRule) -> bool:
    """Whether the kernel computes this: float32, on a device where kernels are in use, within its bounds."""
    return (kernels_for(logits_TE) and logits_TE.dtype == torch.float32 and logits_TE.shape[1] <= MAX_EXPERTS
            and rule.slots <= MAX_SLOTS and rule.groups <= MAX_GROUPS)


def route_tokens(logits_TE: Tensor, rule: RouterRule, bias_E: Tensor | None = None,
                 valid_T: Tensor | None = None, ids_TK: Tensor | None = None) -> Routed:
    """Choose experts by the logits, and compute gate weights and sums. Differentiable in the logits.

    Args:
        logits_TE: logits [T, E], float32 or better.
        rule: how scores and weights are made, and which groups may be chosen.
        bias_E: added to the scores for the choice alone, without gradient; None: no bias.
        valid_T: bool [T], false for padding; None: every token is valid.
        ids_TK: int64 [T, K], an earlier decision that is kept; None: choose.

    Returns:
        Ids, weights in the dtype of the logits, and sums.
    """
    bias_E = None if bias_E is None else bias_E.detach()
    weights_TK, _, prob_sum_E, lse2, entropy, ids_TK, counts_E, tokens, active = _forward(
        logits_TE, bias_E, ids_TK, valid_T, *rule)
    return Routed(ids_TK, weights_TK,
                  RouterSums(tokens, counts_E, prob_sum_E, lse2, entropy, active, torch.zeros_like(active)))
