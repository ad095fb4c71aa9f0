"""Overlap of exchanges and expert computation: dispatch, experts and combine run chunk by chunk.

A micro-batch is cut into chunks of consecutive tokens. With n chunks, forward runs

    d0 d1 E0 c0 d2 E1 c1 … E(n-1) c(n-1)         d: dispatch starts, E: experts, c: combine starts

During E(i), chunk i+1 travels to its experts and chunk i-1 travels back. The shared expert runs during the
last combine. Backward is the mirror image. C and D are the same exchanges in reverse. W computes the
gradients of the experts' matrices over the rows of all chunks (ops/chunked_experts.py), while the last rows
return:

    C(n-1) C(n-2) E'(n-1) D(n-1) C(n-3) E'(n-2) D(n-2) … E'0 D0 W

Nothing schedules backward. Its order follows from a property of autograd: of the nodes that are ready, it
runs the one that was recorded last (seen on torch 2.13; tests/moe/test_overlap.py records the order).
Therefore forward waits for a combine only after the next one has started. Exposed are the first exchange, the
last one, and what takes longer than the computation. The host waits only where the exchange backend itself
waits.

The exchanges and their order follow from the number of chunks alone: a chunk without tokens is exchanged,
too. The outputs of a token are summed inside its chunk. Gradients of matrices are sums over rows in the order
of the chunks, so another number of chunks rounds differently.

Shapes: T tokens, K slots per token, R rows ordered by expert, D width.
"""

from typing import Protocol

from torch import Tensor

from moetrain.moe.dispatch import TokenDispatcher
from moetrain.moe.dispatch_records import DispatchedRows, PendingCombine


class ChunkComputation(Protocol):
    """Computation on dispatched rows, chunk by chunk."""

    def begin(self) -> None:
        """Prepare the computation. Called once, while the first chunks travel."""

    def __call__(self, rows: DispatchedRows) -> Tensor:
        """Compute the outputs [R, D] of the next chunk, ordered by expert."""
        ...


def overlapped_forward(dispatcher: TokenDispatcher, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor,
                       computation: ChunkComputation, num_chunks: int, max_rows: int | None = None, *,
                       read: bool = True) -> PendingCombine:
    """Run a micro-batch through the experts in chunks.

    Args:
        dispatcher: moves rows between positions.
        x_TD: [T, D], tokens.
        ids_TK: int64 [T, K], global expert ids; -1 is unused.
        weights_TK: [T, K], gate weights.
        computation: computes the experts; called once for every chunk, in order.
        num_chunks: 1 or more.
        max_rows: bound on the number of used slots; None: they are counted.
        read: whether backward reads the outputs (`RoutedExperts`).

    Returns:
        The finished chunks and the combine of the last one, which is under way.
    """
    sizes = chunk_sizes(len(x_TD), num_chunks)
    plans = dispatcher.plan(list(ids_TK.split(sizes)), max_rows)
    chunks = list(zip(x_TD.split(sizes), weights_TK.split(sizes), plans, strict=True))
    dispatching, finished = dispatcher.dispatch_async(*chunks[0]), []
    combining: PendingCombine | None = None
    for chunk in range(num_chunks):
        current = dispatching
        if chunk + 1 < num_chunks:
            dispatching = dispatcher.dispatch_async(*chunks[chunk + 1])
        if chunk == 0:
            computation.begin()
        rows = current.wait()
        started = dispatcher.combine_async(computation(rows), rows.metadata, read=read)
        if combining is not None:
            finished.append(combining.wait())
        combining = started
    assert combining is not None
    return combining._replace(finished=tuple(finished))


def chunk_sizes(tokens: int, chunks: int) -> list[int]:
    """Divide tokens into chunks as evenly as possible; a chunk may get none.

    The sizes depend on the two numbers alone.
    """
    cuts = [tokens * chunk // chunks for chunk in range(chunks + 1)]
    return [end - begin for begin, end in zip(cuts, cuts[1:])]
