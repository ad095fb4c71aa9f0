"""Output head and cross-entropy as one op, without the logits of all tokens in memory.

    sum over rows with a target of  log sum_v exp(l_rv) - l_r,target,   l_rv = x_r . h_v + b_v

Rows are processed in chunks, whose logits are computed, reduced and freed, in forward and again in backward.
Backward keeps only x and the head, at the price of one more product: 2 R D V operations beside the head's 6 R
D V. The alternative, gradients computed in forward as in Liger's kernel, keeps a tensor of the head's size
for every micro-batch whose graph is alive.

Logits are computed in the dtype of x and reduced in float32 or better, as without this op; the gradients
of head and bias are summed over chunks in their own dtypes.

Shapes: R rows, D width, V vocabulary, C rows of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(x_RD: Tensor, head_VD: Tensor, targets_R: Tensor, chunk: int,
                         bias_V: Tensor | None = None) -> Tensor:
    """Sum the cross-entropies, in nats, of the rows that have a target.

    Args:
        x_RD: rows [R, D] before the head.
        head_VD: head [V, D]; cast to the dtype of x.
        targets_R: int64 [R]; -1 is no target.
        chunk: number of rows whose logits are in memory at a time.
        bias_V: bias of the logits [V], cast likewise; None is none.

    Returns:
        Scalar, float32, or float64 for float64 rows.
    """
    assert chunk > 0, chunk
    return _LinearCrossEntropy.apply(x_RD, head_VD, bias_V, targets_R, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, head_VD, bias_V, targets_R, chunk):
        ctx.save_for_backward(x_RD, head_VD, bias_V, targets_R)
        ctx.chunk = chunk
        head_VD, bias_V = head_VD.to(x_RD.dtype), None if bias_V is None else bias_V.to(x_RD.dtype)
        total = torch.zeros((), dtype=_better(x_RD.dtype), device=x_RD.device)
        for x_CD, targets_C in zip(x_RD.split(chunk), targets_R.split(chunk)):
            total += F.cross_entropy(_logits(x_CD, head_VD, bias_V), targets_C, ignore_index=-1,
                                     reduction="sum")
        return total

    @staticmethod
    def backward(ctx, grad):
        x_RD, parameter_VD, parameter_V, targets_R = ctx.saved_tensors
        head_VD = parameter_VD.to(x_RD.dtype)
        bias_V = None if parameter_V is None else parameter_V.to(x_RD.dtype)
        wants_x, wants_head, wants_bias = ctx.needs_input_grad[:3]
        d_x_RD = torch.empty_like(x_RD) if wants_x else None
        d_head_VD = torch.zeros_like(parameter_VD) if wants_head else None
        d_bias_V = torch.zeros_like(parameter_V) if wants_bias else None
        begin = 0
        for x_CD, targets_C in zip(x_RD.split(ctx.chunk), targets_R.split(ctx.chunk)):
            d_logits_CV = _gradient(_logits(x_CD, head_VD, bias_V), targets_C).mul_(grad).to(x_RD.dtype)
            if wants_x:
                torch.mm(d_logits_CV, head_VD, out=d_x_RD[begin:begin + len(x_CD)])
            if wants_head and d_head_VD.dtype == x_CD.dtype:
                d_head_VD.addmm_(d_logits_CV.T, x_CD)
            elif wants_head:
                d_head_VD += d_logits_CV.T @ x_CD
            if wants_bias:
                d_bias_V += d_logits_CV.sum(0, dtype=d_bias_V.dtype)
            begin += len(x_CD)
        return d_x_RD, d_head_VD, d_bias_V, None, None


def _logits(x_CD: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    return F.linear(x_CD, head_VD, bias_V).to(_better(x_CD.dtype))


def _gradient(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Gradient of the summed cross-entropies at the logits, whose memory it reuses; zero without a target."""
    has_C1 = (targets_C >= 0)[:, None]
    probs_CV = torch.softmax(logits_CV, -1, out=logits_CV)
    probs_CV.scatter_add_(1, targets_C.clamp(min=0)[:, None], torch.full_like(probs_CV[:, :1], -1.0))
    return probs_CV.mul_(has_C1)


def _better(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32 or better."""
    return dtype if dtype == torch.float64 else torch.float32
