"""Forms of experts: which parameters an expert has, and what it computes from its rows.

`ExpertForm` is the interface, `SwigluExpert` the form that models have unless they choose another. A form
owns no parameters: the bank (bank.py) holds one stacked tensor for each name in SHAPES, and everything that
moves, shards, saves or counts experts goes by these names and shapes.

    SHAPES     parameters of one expert: names, and widths in D (model width) and F (expert width)
    starts     how each parameter starts (ops/start.py)
    rows       outputs of rows ordered by expert, from ops with autograd (ops/expert_linear.py)
    hidden     activations before the last matrix, for diagnostics (activations.py)
    compute    rows of a micro-batch as they arrived: gather, then `rows`
    chunks     the same for a micro-batch that comes in chunks (overlap.py)
    quantize   values that a parameter takes in the computation, with a straight-through gradient

A new form defines SHAPES, `starts` (ops/start.py) and `rows`. SwiGLU replaces `compute` and `chunks` by its
fused op, which keeps less for backward and computes the gradients of matrices once for all chunks.

Shapes: R rows ordered by expert, N rows as they arrived, e experts at home here, c copies, D model width, F
expert width.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from moetrain.ops.chunked_experts import ChunkedExperts
from moetrain.ops.expert_linear import expert_linear, expert_vectors
from moetrain.ops.grouped_experts import grouped_experts
from moetrain.ops.grouped_gemm import Counts, make_groups, takes_counts_on_device
from moetrain.ops.permute import Permutation, permute, permute_padded
from moetrain.ops.start import Start, constant, normal, residual_normal
from moetrain.ops.swiglu import only_used, swiglu
from moetrain.shapes import Shapes, shapes_of

# Computes the weighted outputs [R, D] of a chunk from its rows, gate weights, counts and order.
ChunkComputation = Callable[[Tensor, Tensor, Counts, Permutation], Tensor]


class StackedParameters:
    """Parameters of the experts of a layer, applied to rows ordered by expert.

    Args:
        names: names of the parameters.
        homes: parameters [e, …] of the experts at home here, in the order of the names.
        copies: parameters [c, …] of copies of other experts, which come after these; None without copies.
        counts_e: rows of each expert, copies included; on the host, or int64 on the device.
    """

    def __init__(self, names: Sequence[str], homes: Sequence[Tensor], copies: Sequence[Tensor] | None,
                 counts_e: Counts) -> None:
        self.parameters = {name: (home, copies and copies[at])
                           for at, (name, home) in enumerate(zip(names, homes, strict=True))}
        self.counts_e = counts_e

    def linear(self, name: str, x_RI: Tensor) -> Tensor:
        """Multiply every row [R, I] by the matrix [O, I] of its expert: [R, O]."""
        return expert_linear(x_RI, *self.parameters[name], self.counts_e)

    def vectors(self, name: str, x_RI: Tensor) -> Tensor:
        """Give every row of x the vector [O] of its expert, such as a bias: [R, O] in the dtype of x."""
        return expert_vectors(x_RI, *self.parameters[name], self.counts_e)


class ExpertForm:
    """Form of the experts of a layer.

    Args:
        dim: model width D.
        expert_dim: expert width F.
    """

    # Read from source, without torch (config/sizes.py), so a literal. A width is a number, or D or F, with a
    # factor if there is one, such as 2F. The first width of a parameter is the one that is cut for sharding.
    SHAPES: ClassVar[dict[str, tuple[str | int, ...]]] = {}
    # Numbers that backward keeps of a row, for estimates of memory, in the same letters; a literal, too. So
    # much, about, autograd keeps for a form with one hidden width.
    KEPT: ClassVar[tuple[str | int, ...]] = ("D", "4F")
    # Parameters whose values `quantize` changes; a literal, too.
    QUANTIZED: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, dim: int, expert_dim: int) -> None:
        self.dim, self.expert_dim = dim, expert_dim
        self.shapes: Shapes = shapes_of(self.SHAPES, D=dim, F=expert_dim)
        if not self.shapes:
            raise ValueError("SHAPES names no parameter")
        assert set(self.QUANTIZED) <= self.shapes.keys(), (self.QUANTIZED, self.SHAPES)

    def starts(self) -> dict[str, Start]:
        """Rule by which each parameter starts (ops/start.py), by its name.

        Vectors start at 0. Matrices start at random, smaller where they give D numbers, which are added to
        the residual stream.
        """
        return {name: constant(0.0) if len(widths) == 1 else
                residual_normal() if widths[0] == "D" else normal() for name, widths in self.SHAPES.items()}

    @property
    def numbers(self) -> int:
        """Numbers that an expert has as parameters."""
        return sum(map(prod, self.shapes.values()))

    def matrix_rows(self) -> dict[str, list[int]]:
        """Rows of each matrix of a parameter that stacks several, by name; for optimizers of matrices."""
        return {}

    @property
    def row_flops(self) -> int:
        """Operations of an expert on one row, in forward: 2 for each number of a matrix."""
        return sum(2 * prod(shape) for shape in self.shapes.values() if len(shape) > 1)

    def takes_counts_on_device(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether counts of rows may stay on a device, for rows of this dtype (ops/grouped_gemm.py)."""
        widths = {width for shape in self.shapes.values() for width in shape}
        return takes_counts_on_device(device, dtype, *widths)

    def rows(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        """Compute the weighted outputs of rows ordered by expert. Differentiable.

        Results of `experts.linear` must not be changed in place: activation checkpointing may have recorded
        them.

        Args:
            x_RD: rows [R, D].
            weights_R: gate weights [R], float32 or better; the outputs are multiplied by them (`weighted`).
            experts: parameters of the experts.

        Returns:
            Rows [R, D] in the dtype of x.
        """
        raise TypeError(f"{type(self).__name__} does not define rows")

    def hidden(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        """Compute the activations [R, F] that the last matrix is given, without gate weights.

        A part of `compute`, for diagnostics alone. Arguments as of `rows`.
        """
        raise TypeError(f"{type(self).__name__} does not define hidden")

    def quantize(self, name: str, stacked: Tensor) -> Tensor:
        """Compute the values that parameters in QUANTIZED take in the computation. No gradient.

        Args:
            name: name of the parameter.
            stacked: [e, …], float32 or better; each expert is quantized by itself.

        Returns:
            [e, …] in the same dtype, not changed in place.
        """
        raise TypeError(f"{type(self).__name__} does not define quantize")

    def compute(self, x_ND: Tensor, weights_R: Tensor, counts_e: Counts, order: Permutation | None,
                homes: Sequence[Tensor], copies: Sequence[Tensor] | None = None,
                part: str = "rows") -> Tensor:
        """Compute the weighted outputs of rows as they arrived. Differentiable.

        Args:
            x_ND: rows as they arrived, [N, D].
            weights_R: gate weights [R] in the order of the output, float32 or better.
            counts_e: rows of each expert, copies included. On the device, R is a bound, and rows behind those
                of the last expert are padding, which holds anything.
            order: which arrived row is which expert's row; None: x is ordered by expert.
            homes: parameters of the experts at home here, in the order of SHAPES.
            copies: parameters of copies of other experts, which come after these.
            part: the method that computes them: `rows`, or one of its signature for a form whose matrices are
                used apart, such as queries and outputs of attention experts.

        Returns:
            Rows [R, D] in the dtype of x, ordered by expert.
        """
        padded = isinstance(counts_e, Tensor)
        x_RD = x_ND if order is None else (permute_padded if padded else permute)(x_ND, order)
        used = make_groups(counts_e, x_ND.device).used
        if used is not None:                                  # padding gets no gradient
            x_RD, weights_R = only_used(x_RD, used), only_used(weights_R, used)
        experts = StackedParameters(tuple(self.shapes), homes, copies, counts_e)
        return getattr(self, part)(x_RD, weights_R, experts)

    def chunks(self, homes: Sequence[Tensor], copies: Sequence[Tensor] | None = None,
               waited: Tensor | None = None, part: str = "rows") -> ChunkComputation:
        """Return the function that computes the chunks of a micro-batch, in order.

        Called where backward shall run last (ops/chunked_experts.py).

        Args:
            homes: parameters of the experts at home here, in the order of SHAPES.
            copies: parameters of copies of other experts, which come after these.
            waited: empty tensor through whose node copies were waited for. That node's backward runs after
                that of all chunks, also where all parameters are frozen.
            part: as for `compute`.
        """

        def compute(x_ND: Tensor, weights_R: Tensor, counts_e: Counts, order: Permutation) -> Tensor:
            if waited is not None:
                x_ND = _After.apply(x_ND, waited)
            return self.compute(x_ND, weights_R, counts_e, order, homes, copies, part)

        return compute


class SwigluExpert(ExpertForm):
    """SwiGLU: down(silu(gate x) * (up x) * w), as in Llama, Mixtral, OLMoE and DeepSeek.

    `gate_up` has gate rows, then up rows.
    """

    SHAPES = {"gate_up": ("2F", "D"), "down": ("D", "F")}
    KEPT = ("2F",)

    def matrix_rows(self) -> dict[str, list[int]]:
        return {"gate_up": [self.expert_dim] * 2}

    def rows(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        return experts.linear("down", swiglu(experts.linear("gate_up", x_RD), weights_R))

    def hidden(self, x_RD: Tensor, weights_R: Tensor, experts: StackedParameters) -> Tensor:
        return swiglu(experts.linear("gate_up", x_RD))

    def compute(self, x_ND: Tensor, weights_R: Tensor, counts_e: Counts, order: Permutation | None,
                homes: Sequence[Tensor], copies: Sequence[Tensor] | None = None,
                part: str = "rows") -> Tensor:
        if part != "rows":
            return super().compute(x_ND, weights_R, counts_e, order, homes, copies, part)
        gate_up_eGD, down_eDF = homes
        return grouped_experts(x_ND, weights_R, gate_up_eGD, down_eDF, counts_e, order, copies)

    def chunks(self, homes: Sequence[Tensor], copies: Sequence[Tensor] | None = None,
               waited: Tensor | None = None, part: str = "rows") -> ChunkComputation:
        if part != "rows":
            return super().chunks(homes, copies, waited, part)
        gate_up_eGD, down_eDF = homes
        return ChunkedExperts(gate_up_eGD, down_eDF, copies, waited)


def weighted(rows_RI: Tensor, weights_R: Tensor) -> Tensor:
    """Multiply rows by their gate weights, in the dtype of the weights: [R, I] in the dtype of the rows."""
    return (rows_RI * weights_R[:, None]).to(rows_RI.dtype)


class _After(torch.autograd.Function):
    """Rows, unchanged, through a node after whose backward that of another node may run."""

    @staticmethod
    def forward(ctx, x_ND, waited):
        ctx.waited = torch.zeros_like(waited)
        return x_ND.view_as(x_ND)

    @staticmethod
    def backward(ctx, grad_ND):
        return grad_ND, ctx.waited


class StraightThrough(torch.autograd.Function):
    """Quantized values in forward; in backward, the gradient of the values that were quantized is theirs."""

    @staticmethod
    def forward(ctx, parameter, quantized):
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
