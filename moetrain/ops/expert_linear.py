"""Products of rows with the parameters of their experts, with autograd: what forms of experts are made of.

    expert_linear     out[r] = W_e x[r]        W_e: a matrix of the expert of row r
    expert_vectors    out[r] = v_e             v_e: a vector of the expert of row r, such as a bias

As in ops/grouped_experts.py, parameters are cast where they are used, those of copies come after those at
home, and backward keeps neither the cast nor the concatenation. A parameter that needs no gradient costs
nothing in backward. Rows behind those of the last expert (counts on the device) are padding, which may hold
anything: no gradient of a parameter reads it.

Both are ops of their own, so activation checkpointing can record their results
(model/activation_checkpointing.py).

Shapes: R rows ordered by expert, e experts at home here, c copies, I and O widths.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moetrain.ops.extension import define
from moetrain.ops.grouped_gemm import (
    Counts,
    Groups,
    expert_of_rows,
    grouped_outer,
    grouped_product,
    homes_and_copies,
    make_groups,
)


def expert_linear(x_RI: Tensor, homes_eOI: Tensor, copies_cOI: Tensor | None, counts_e: Counts) -> Tensor:
    """Multiply every row by a matrix of its expert. Differentiable in rows and matrices.

    Args:
        x_RI: rows [R, I], ordered by expert.
        homes_eOI: matrices of the experts at home here, [e, O, I], float32 or better.
        copies_cOI: matrices of copies, which come after these, or None.
        counts_e: rows of each expert, copies included; on the host, or int64 on the device.

    Returns:
        Rows [R, O] in the dtype of x.
    """
    return _of(_LINEAR, counts_e)(x_RI, homes_eOI, copies_cOI, counts_e)


def expert_vectors(x_RI: Tensor, homes_eO: Tensor, copies_cO: Tensor | None, counts_e: Counts) -> Tensor:
    """Give every row a vector of its expert. Differentiable in the vectors.

    Args:
        x_RI: rows [R, I], ordered by expert, for their number, dtype and device.
        homes_eO: vectors of the experts at home here, [e, O], float32 or better.
        copies_cO: vectors of copies, which come after these, or None.
        counts_e: rows of each expert, copies included; on the host, or int64 on the device.

    Returns:
        Rows [R, O] in the dtype of x.
    """
    return _of(_VECTORS, counts_e)(x_RI.detach(), homes_eO, copies_cO, counts_e)


def _linear(x_RI: Tensor, homes_eOI: Tensor, copies_cOI: Tensor | None, counts_e: Counts) -> Tensor:
    matrices = homes_and_copies(homes_eOI, copies_cOI, x_RI.dtype)
    return grouped_product(x_RI.contiguous(), matrices.mT, make_groups(counts_e, x_RI.device))


def _linear_gradients(ctx, grad_RO: Tensor):
    x_RI, homes_eOI, copies_cOI, counts_e = _saved(ctx)
    of_x, *of_matrices = ctx.needs_input_grad[:3]
    groups = make_groups(counts_e, x_RI.device)
    grad_RO = grad_RO.contiguous()
    d_x_RI = (grouped_product(grad_RO, homes_and_copies(homes_eOI, copies_cOI, x_RI.dtype), groups)
              if of_x else None)
    d_all = grouped_outer(grad_RO, x_RI.contiguous(), groups) if any(of_matrices) else None
    return d_x_RI, *_divided(d_all, homes_eOI, of_matrices), None


def _vectors(x_RI: Tensor, homes_eO: Tensor, copies_cO: Tensor | None, counts_e: Counts) -> Tensor:
    groups = make_groups(counts_e, x_RI.device)
    return homes_and_copies(homes_eO, copies_cO, x_RI.dtype).index_select(0, expert_of_rows(groups, x_RI))


def _vectors_gradients(ctx, grad_RO: Tensor):
    homes_eO, counts_e = _saved(ctx)
    of_vectors = ctx.needs_input_grad[1:3]
    d_all = None
    if any(of_vectors):
        d_all = _sum_of_rows(grad_RO, make_groups(counts_e, grad_RO.device))
    return None, *_divided(d_all, homes_eO, of_vectors), None


def _sum_of_rows(grad_RO: Tensor, groups: Groups) -> Tensor:
    """Sum the rows of each expert, [e, O], in float32 or better: a product with ones, without atomics."""
    wide_RO = grad_RO.to(torch.promote_types(grad_RO.dtype, torch.float32)).contiguous()
    ones_RA = wide_RO.new_ones(len(wide_RO), 16 // wide_RO.dtype.itemsize)   # grouped_mm takes 16 bytes
    return grouped_outer(ones_RA, wide_RO, groups)[:, 0]


def _divided(d_all: Tensor | None, homes: Tensor, needed) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of homes and of copies, from those of all experts; None where none is needed."""
    if d_all is None:
        return None, None
    d_all, count = d_all.to(homes.dtype), len(homes)
    if len(d_all) == count and not needed[1]:        # as in ops/grouped_experts.py: no part of a tensor
        return d_all, None
    return d_all[:count] if needed[0] else None, d_all[count:] if needed[1] else None


def _save_linear(ctx, inputs, output) -> None:
    *tensors, counts_e = inputs
    _save(ctx, tensors, counts_e)


def _save_vectors(ctx, inputs, output) -> None:
    _, homes, _, counts_e = inputs
    _save(ctx, [homes], counts_e)


def _save(ctx, tensors: list[Tensor | None], counts_e: Counts) -> None:
    on_device = isinstance(counts_e, Tensor)
    ctx.counts_e = None if on_device else counts_e
    ctx.save_for_backward(*tensors, *([counts_e] if on_device else []))


def _saved(ctx) -> tuple:
    return ctx.saved_tensors if ctx.counts_e is None else (*ctx.saved_tensors, ctx.counts_e)


def _define(name: str, reference: Callable, gradients: Callable, save: Callable) -> tuple[Callable, Callable]:
    """Define an op for counts on the host, and one for counts on the device."""

    def fake(x_RI, homes, copies, counts_e):
        return x_RI.new_empty(x_RI.shape[0], homes.shape[1])

    host, device = (
        define(f"{name}{suffix}(Tensor x_RI, Tensor homes, Tensor? copies, {counts} counts_e) -> Tensor",
               reference=reference, fake=fake, backward=gradients, setup_context=save)
        for suffix, counts in (("", "SymInt[]"), ("_padded", "Tensor")))
    return host, device


def _of(ops: tuple[Callable, Callable], counts_e: Counts) -> Callable:
    return ops[isinstance(counts_e, Tensor)]


_LINEAR = _define("expert_linear", _linear, _linear_gradients, _save_linear)
_VECTORS = _define("expert_vectors", _vectors, _vectors_gradients, _save_vectors)
