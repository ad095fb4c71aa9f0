"""The sum of a router's probabilities as one op of its logits z, and its gradient in closed form.

    P = sum_t p_t over valid tokens;   p = softmax(z), or s / sum(s) of s = sigmoid(z)

A loss that is linear in P, as every balance loss is (losses/load_balance.py), has one slope a_E = dL/dP an expert, and

    softmax   dL/dz = p (a - <p, a>)                        sums to 0 over the experts of a token
    sigmoid   dL/dz = s (1 - s) (a - <p, a>) / sum(s)       sums to 0 after division by 1 - s

For the loss E sum_i f_i P_i / N that is E/N p (f - <p, f>), with f a constant.

The routers (routers/topk.py, routers/sigmoid.py) do not call it. Their probabilities also make the gate weights, so one softmax
backward serves both; with this op instead, scores, weights, sums and backward of 2,048 tokens and 64 experts took 3 times as long on
a CPU. It is the second form against which autograd's gradient, and a kernel that takes slopes, are held, and what
tools/study/balance_gradients.py takes for exact.

Shapes: T tokens, E experts.
"""

import torch
from torch import Tensor

from moetrain.ops.extension import define

TINY = 1e-20                                 # of routers/sigmoid.py: 0 / 0 of scores that have underflowed


def _probs(logits_TE: Tensor, valid_T: Tensor | None, sigmoid: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Probabilities, 0 in padding, whatever it holds; and of sigmoid scores, these and their sums."""
    if valid_T is not None:
        logits_TE = logits_TE.where(valid_T[:, None], 0)
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    total_T1 = scores_TE.sum(-1, keepdim=True) + TINY if sigmoid else None
    probs_TE = scores_TE / total_T1 if sigmoid else scores_TE
    return probs_TE if valid_T is None else probs_TE.where(valid_T[:, None], 0), scores_TE, total_T1


def _reference(logits_TE: Tensor, valid_T: Tensor | None, sigmoid: bool) -> Tensor:
    return _probs(logits_TE, valid_T, sigmoid)[0].sum(0)


def _reference_slopes(logits_TE: Tensor, slopes: Tensor, valid_T: Tensor | None, sigmoid: bool) -> Tensor:
    probs_TE, scores_TE, total_T1 = _probs(logits_TE, valid_T, sigmoid)
    against_TE = slopes - (probs_TE * slopes).sum(-1, keepdim=True)
    if not sigmoid:
        return probs_TE * against_TE
    return probs_TE * (1 - scores_TE) * against_TE       # p = s / sum(s), and 0 in padding


def _save(ctx, inputs, output) -> None:
    logits_TE, valid_T, ctx.sigmoid = inputs
    ctx.save_for_backward(logits_TE, valid_T)


_slopes = define(
    "router_slopes(Tensor logits_TE, Tensor slopes, Tensor? valid_T, bool sigmoid) -> Tensor",
    reference=_reference_slopes,
    fake=lambda logits_TE, slopes, valid_T, sigmoid: torch.empty_like(logits_TE),
)
_prob_sum = define(
    "prob_sum(Tensor logits_TE, Tensor? valid_T, bool sigmoid) -> Tensor",
    reference=_reference,
    fake=lambda logits_TE, valid_T, sigmoid: logits_TE.new_empty(logits_TE.shape[1]),
    backward=lambda ctx, grad_E: (_slopes(ctx.saved_tensors[0], grad_E, ctx.saved_tensors[1], ctx.sigmoid), None, None),
    setup_context=_save,
)


def prob_sum(logits_TE: Tensor, valid_T: Tensor | None = None, *, sigmoid: bool = False) -> Tensor:
    """P [E], with gradient. valid_T: bool, false in padding."""
    return _prob_sum(logits_TE, valid_T, sigmoid)


def router_slopes(logits_TE: Tensor, slopes: Tensor, valid_T: Tensor | None = None, *, sigmoid: bool = False) -> Tensor:
    """dL/dz [T, E] from the slopes dL/dP: [E], or [T, E] where tokens have slopes of their own. No gradient."""
    return _slopes(logits_TE, slopes, valid_T, sigmoid)
