"""Dispatch, experts, combine, chunk by chunk, so that rows travel while others are computed.

A micro-batch's tokens are cut into chunks of consecutive ones. With n chunks, forward:

    d0 d1 E0 c0 d2 E1 c1 … E(n-1) c(n-1)         d: dispatch starts, E: experts, c: combine starts

so under E(i) chunk i+1 is on its way to its experts and chunk i-1 on its way back; the shared expert runs under the last combine.
Backward is the mirror image, C and D being the same exchanges turned round:

    C(n-1) C(n-2) E'(n-1) D(n-1) C(n-3) E'(n-2) D(n-2) … E'0 D0 W

W being the gradients of the experts' weights, over the rows of all chunks (ops/chunked_experts.py), while the last rows
return. It comes of autograd's order alone (of what may run, what was recorded last runs first), which is why a combine is waited
for only after the next one has started. Only the first exchange and the last stay in sight, and of the others what takes longer than the computation.
Nothing here waits on the host but for what the wire itself waits for.

What is posted, and in which order, follows from the number of chunks alone: a chunk without tokens travels too. With one position
there is nothing to hide, and a micro-batch is one chunk. Every token's outputs are summed inside its chunk; the gradients of
expert weights are sums over rows in the order of their chunks, so that another number of chunks rounds otherwise.

A number of chunks that is planned (from profiles, for every layer) has its place in `Pipeline.chunks`.

Shapes: T tokens, K slots per token, D width.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moetrain.moe.dispatch import Returning, Sent, TokenDispatcher


class Output(NamedTuple):
    """Chunks that are back, and the last one, which is still on its way. FSDP2 looks for tensors in what leaves a module."""

    done: tuple[Tensor, ...]
    last: Returning

    def wait(self) -> Tensor:
        """[T, D], every token's sum over its experts."""
        last_TD = self.last.wait()
        return torch.cat([*self.done, last_TD]) if self.done else last_TD


class Experts(Protocol):
    """What is computed."""

    def begin(self) -> None:
        """Before the first chunk, while it is on its way."""

    def __call__(self, sent: Sent) -> Tensor:
        """Of a chunk, one after the other."""
        ...


class Pipeline:
    """chunks: of a micro-batch, where rows travel."""

    def __init__(self, dispatcher: TokenDispatcher, chunks: int = 1) -> None:
        self.dispatcher = dispatcher
        self.chunks = chunks if dispatcher.exchange.positions > 1 else 1

    def run(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: Experts) -> Output:
        """Rows to the experts and on their way back."""
        sizes = chunk_sizes(len(x_TD), self.chunks)
        courses = self.dispatcher.prepare(list(ids_TK.split(sizes)))
        parts = list(zip(x_TD.split(sizes), weights_TK.split(sizes), courses, strict=True))
        arriving, returning, done = self.dispatcher.send(*parts[0]), None, []
        for chunk in range(self.chunks):
            here = arriving
            if chunk + 1 < self.chunks:
                arriving = self.dispatcher.send(*parts[chunk + 1])
            if chunk == 0:
                experts.begin()
            sent = here.wait()
            leaving = self.dispatcher.send_back(experts(sent), sent.ticket)
            if returning is not None:
                done.append(returning.wait())
            returning = leaving
        return Output(tuple(done), returning)


def chunk_sizes(tokens: int, chunks: int) -> list[int]:
    """Tokens of each chunk: as equal as may be, the same however they are spread; 0 where there are too few."""
    cuts = [tokens * chunk // chunks for chunk in range(chunks + 1)]
    return [end - begin for begin, end in zip(cuts, cuts[1:])]
