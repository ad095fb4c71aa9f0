"""Expert parameters of one layer on this position, and the five hooks that bring in copies of other experts.

`ExpertBank` owns the parameters of the experts whose home is here. Under expert parallelism (`ep`) its hooks
do nothing. Under `fssdp`, parallel/fssdp/copies.py sets `copies`, and the hooks delegate to it:

    prefetch                    model/transformer.py by way of moe/layer.py, before attention
                                start the sparse all-gather of copies
    reduce_grads_in_backward    moe/experts.py, on tokens before dispatch
                                in backward, start the sparse reduce-scatter of the copies' gradients
    wait                        moe/experts.py, before the grouped product
                                wait for copies; in backward, accumulate their gradients
    regather_in_backward        moe/experts.py, around the grouped product
                                make autograd save a copy's strides and offset instead of the copy
    release_after_forward       moe/experts.py, after the grouped product
                                drop copies; in backward, start to gather them again

The bank itself knows of no other position. Its form (expert_form.py) says which parameters an expert has. The
bank stores one stacked Parameter for each of them, under its name. Where experts may be sliced, it stores a
second one for this position's slices. parallel/state_shards.py alone maps these to
the names under which tensors are initialized and saved: layer, expert id and parameter. A position may own no
expert.

Shapes: e experts on this rank, c copies, T tokens, D model width, N rows that arrived, R rows ordered by
expert.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from moetrain.moe.expert_form import ExpertForm, StraightThrough
from moetrain.ops.start import Start
from moetrain.plan.placement import slice_rows

CopiedParameters = tuple[Tensor, ...]        # [c, …], in the order of the form's SHAPES


class Copies(Protocol):
    """Copies of experts of other positions, for one layer. The methods are the hooks of `ExpertBank`."""

    def prefetch(self) -> None: ...
    def wait(self, x_ND: Tensor) -> tuple[Tensor, CopiedParameters | None]: ...
    def regather_in_backward(self) -> AbstractContextManager[None]: ...
    def release_after_forward(self, out_RD: Tensor) -> Tensor: ...
    def reduce_grads_in_backward(self, x_TD: Tensor) -> Tensor: ...


class ExpertBank(nn.Module):
    """Parameters of the experts of one layer that this position holds.

    Args:
        experts: global ids of the experts held here whole, ascending.
        form: their parameters, and what they compute.
        cut: (position, positions) if experts may be sliced (plan/placement.py). This position then holds
            rows of every parameter of every expert in `sliced`, which is empty at first. None: never sliced.
    """

    def __init__(self, *, experts: tuple[int, ...], form: ExpertForm,
                 cut: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.experts, self.form, self.cut = experts, form, cut
        assert cut is None or not form.QUANTIZED, "a slice cannot be quantized by itself"
        self.names = tuple(form.shapes)
        self.slices = tuple(f"{name}_slices" for name in self.names)
        self.sliced: tuple[int, ...] = ()
        for name, slices, (rows, *widths) in zip(self.names, self.slices, form.shapes.values()):
            self.register_parameter(name, nn.Parameter(torch.empty(len(experts), rows, *widths)))
            if cut is not None:
                self.register_parameter(
                    slices, nn.Parameter(torch.empty(0, len(slice_rows(rows, *cut)), *widths)))
        self.copies: Copies | None = None

    def starts(self) -> dict[str, Start]:
        """How an expert's parameters start. Slices are of experts that were whole before."""
        found = self.form.starts()
        if self.cut is not None:
            found |= {slices: found[name] for name, slices in zip(self.names, self.slices) if name in found}
        return found

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of an expert's parameters, in the order of `names`."""
        return list(self.form.shapes.values())

    @property
    def vectors(self) -> list[nn.Parameter]:
        """The parameters that are vectors of each expert, such as biases, slices of them included."""
        held = (*self.names, *self.slices) if self.cut is not None else self.names
        return [self.stacked(name) for name in held if self.stacked(name).ndim == 2]

    @property
    def like(self) -> Tensor:
        """Some parameter, for the device of all."""
        return self.stacked(self.names[0])

    def stacked(self, name: str) -> nn.Parameter:
        """The parameter of a name, of all experts or slices here."""
        return getattr(self, name)

    def values(self) -> tuple[Tensor, ...]:
        """The values that all experts here compute with, [e, …], in the order of `names`. Differentiable."""
        return tuple(parameter if values is parameter else StraightThrough.apply(parameter, values)
                     for parameter, values in ((self.stacked(name), self.value(name)) for name in self.names))

    def value(self, name: str) -> Tensor:
        """The values that a parameter takes in the computation: its own unless the form quantizes it."""
        parameter = self.stacked(name)
        if name not in self.form.QUANTIZED:
            return parameter
        with torch.no_grad():
            return self.form.quantize(name, parameter)

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that are not frozen, in the order of `names`."""
        return tuple(name for name in self.names if self.stacked(name).requires_grad)

    def prefetch(self) -> None:
        """Start gathering copies. Does not wait."""
        if self.copies is not None:
            self.copies.prefetch()

    def wait(self, x_ND: Tensor) -> tuple[Tensor, CopiedParameters | None]:
        """Wait for copies; return the rows and the copies' parameters, or None without copies.

        The rows pass through an autograd node, so that its backward runs on every rank.
        """
        return (x_ND, None) if self.copies is None else self.copies.wait(x_ND)

    def regather_in_backward(self) -> AbstractContextManager[None]:
        """Context in which autograd saves the geometry of a copy instead of the copy.

        Does nothing unless copies are dropped after forward and gathered again in backward.
        """
        return nullcontext() if self.copies is None else self.copies.regather_in_backward()

    def release_after_forward(self, out_RD: Tensor) -> Tensor:
        """Drop copies that are gathered again in backward.

        The outputs [R, D] pass through an autograd node, whose backward starts the second gather.
        """
        return out_RD if self.copies is None else self.copies.release_after_forward(out_RD)

    def reduce_grads_in_backward(self, x_TD: Tensor) -> Tensor:
        """Pass tokens [T, D] through an autograd node on their way to dispatch.

        Its backward runs after the gradients of all rows have arrived. It starts sending the gradients of
        copies to their homes.
        """
        return x_TD if self.copies is None else self.copies.reduce_grads_in_backward(x_TD)


def is_expert_parameter(model: nn.Module) -> Callable[[nn.Parameter], bool]:
    """Make a predicate that tells the parameters of routed experts from the others of the model."""
    owned = {id(p) for m in model.modules() if isinstance(m, ExpertBank) for p in m.parameters()}
    return lambda parameter: id(parameter) in owned
