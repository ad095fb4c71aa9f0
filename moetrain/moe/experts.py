"""Routed experts of a layer, computed over ragged rows.

What an expert computes is said by its form (expert_form.py). Parameters are float32 (or float64) and cast
where they are used.

Shapes: T tokens, K slots per token, R rows ordered by expert, N rows as they arrived, D model width.
"""

from typing import NamedTuple

from torch import Tensor, nn

from moetrain.moe.bank import ExpertBank
from moetrain.moe.dispatch import TokenDispatcher
from moetrain.moe.dispatch_records import DispatchedRows, PendingCombine
from moetrain.moe.overlap import overlapped_forward


class FinishedSlots(NamedTuple):
    """Outputs of all slots [T, K, D], which have arrived. As a NamedTuple, so that FSDP2 finds the tensor."""

    out_TKD: Tensor

    def wait(self) -> Tensor:
        return self.out_TKD


class RoutedExperts(nn.Module):
    """Routed experts of one layer: the bank with their matrices, and the dispatcher that brings rows to them.

    One module owns both, so FSDP2 gathers the matrices once a pass, whatever the number of chunks.

    Args:
        bank: experts of this position.
        dispatcher: moves rows between positions.
        num_chunks: parts of a micro-batch whose exchanges hide under each other's computation. With one
            position nothing is exchanged, and the micro-batch is one chunk.
    """

    def __init__(self, bank: ExpertBank, dispatcher: TokenDispatcher, num_chunks: int = 1) -> None:
        super().__init__()
        self.bank, self.dispatcher = bank, dispatcher
        self.num_chunks = num_chunks if dispatcher.exchange.positions > 1 else 1

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, max_rows: int | None = None, *,
                read: bool = True, part: str = "rows",
                reduce: bool = True) -> "PendingCombine | FinishedSlots":
        """Dispatch tokens, run the experts, start the combine.

        The arguments are two tensors instead of a `Routing`, because FSDP2 passes every tensor of an argument
        through an autograd node of its own, including statistics that no expert reads.

        Args:
            x_TD: [T, D], tokens.
            ids_TK: int64 [T, K], global expert ids; -1 is unused.
            weights_TK: [T, K], gate weights.
            max_rows: bound on the number of used slots (`Routing.max_rows`); None: they are counted.
            read: whether backward reads the values of the outputs, as a product with them does. A sum does
                not. Outputs that are not read are NaN where activation checkpointing runs the layer again,
                which saves an exchange (model/activation_checkpointing.py).
            part: what of the form is computed (expert_form.py).
            reduce: sum the outputs of each token. Otherwise the outputs of all slots come back, unsummed.

        Returns:
            The combine under way; `wait` gives [T, D], or without `reduce` [T, K, D], zeros in unused slots.
        """
        x_TD = self.bank.reduce_grads_in_backward(x_TD)
        if self.num_chunks > 1 and reduce:
            computation = ChunkedComputation(self.bank, self.num_chunks, part)
            return overlapped_forward(self.dispatcher, x_TD, ids_TK, weights_TK, computation, self.num_chunks,
                                      max_rows, read=read)
        dispatched = self.dispatcher.dispatch(x_TD, ids_TK, weights_TK, max_rows)
        out_RD = self.compute(dispatched, part)
        if not reduce:
            return FinishedSlots(self.dispatcher.combine(out_RD, dispatched.metadata, reduce=False))
        return self.dispatcher.combine_async(out_RD, dispatched.metadata, read=read)

    def compute(self, rows: DispatchedRows, part: str = "rows") -> Tensor:
        """Compute weighted outputs [R, D], ordered by expert. Waits for copies of experts."""
        bank = self.bank
        x_ND, copies = bank.wait(rows.x_ND)
        with bank.regather_in_backward():
            out_RD = bank.form.compute(x_ND, rows.weights_R, rows.counts_e, rows.order, bank.values(), copies,
                                       part)
        return bank.release_after_forward(out_RD)


class ChunkedComputation:
    """Computation of a bank's experts over the chunks of one micro-batch, in order.

    Copies of experts serve all chunks: `begin` waits for them, and the last chunk releases them.
    """

    def __init__(self, bank: ExpertBank, num_chunks: int, part: str = "rows") -> None:
        self.bank, self.chunks_left, self.part = bank, num_chunks, part

    def begin(self) -> None:
        """Wait for copies. Called while the first chunks travel.

        Autograd runs nodes in reverse of their recording. The node recorded here therefore computes the
        gradients of all matrices after the gradients of all rows have started back, where the form does so
        (ops/chunked_experts.py).
        """
        waited, copies = self.bank.wait(self.bank.like.new_empty(0))
        self.experts = self.bank.form.chunks(self.bank.values(), copies, waited, self.part)

    def __call__(self, rows: DispatchedRows) -> Tensor:
        """Compute the weighted outputs [R, D] of the next chunk, ordered by expert."""
        self.chunks_left -= 1
        assert rows.order is not None                        # chunks come from several positions
        with self.bank.regather_in_backward():
            out_RD = self.experts(rows.x_ND, rows.weights_R, rows.counts_e, rows.order)
        if self.chunks_left:
            return out_RD
        del self.experts
        return self.bank.release_after_forward(out_RD)
