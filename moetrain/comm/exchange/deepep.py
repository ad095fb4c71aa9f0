"""Exchange backend over DeepEP (github.com/deepseek-ai/DeepEP, `deep_ep.Buffer`). Unverified: never run yet.

A message is handed to DeepEP's dispatch as rows of bfloat16 that go to one rank each. The rows are moved and
not computed with, so bits of any dtype pass. This relies on what DeepEP's kernels do: rows arrive by source
rank, and those of one source in their order. That a token goes to a rank once is already done
(moe/row_packing.py). DeepEP learns on the host how many rows will arrive.

Activation checkpointing sees no operator here: what runs again in backward sends its rows again, on all ranks
alike.
"""

from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.comm.exchange.async_exchange import exchange_async
from moetrain.comm.exchange.base import Counts, Exchange, Handle, Splits
from moetrain.ops.pinned import to_device

UNIT = 16                        # bytes that DeepEP's copies move at once
NVL_BYTES = RDMA_BYTES = 1 << 30


def buffer(package: Any, process_group: Any, nodes: int) -> Any:
    """Make DeepEP's buffer for a group. All layers share it."""
    return package.Buffer(process_group, NVL_BYTES, RDMA_BYTES if nodes > 1 else 0)


class DeepEPExchange:
    """Exchange of one layer over DeepEP.

    Args:
        flat: exchanges counts, which are small.
        buffer: DeepEP's buffer.
    """

    def __init__(self, flat: Exchange, buffer: Any) -> None:
        self.flat, self.buffer = flat, buffer
        self.positions, self.position = flat.positions, flat.position
        self.on_way: dict[int, tuple[Any, torch.dtype, torch.Size]] = {}

    def counts(self, sent_P: Tensor) -> Tensor:
        return self.flat.counts(sent_P)

    def announce(self, sent_CP: Tensor, received_CP: Tensor) -> Tensor:
        return self.flat.announce(sent_CP, received_CP)

    def splits(self, sent: Counts, received: Counts, announced: Counts) -> list[Splits]:
        return self.flat.splits(sent, received, announced)

    def post(self, tensors: tuple[Tensor, ...], splits: Splits, *, read: bool = True) -> Handle:
        return exchange_async(self, tensors, splits, read)

    def start(self, message: Tensor, splits: Splits, *, returning: bool, read: bool) -> Tensor:
        rows = as_units(message)
        positions = torch.arange(self.positions, device=message.device)
        sent_P = to_device(torch.tensor(splits.sent), message.device)
        to_N1 = positions.repeat_interleave(sent_P, output_size=len(message))[:, None]
        layout = self.buffer.get_dispatch_layout(to_N1, self.positions)
        per_rank, per_rdma_rank, per_expert, in_rank, _ = layout
        received, _, _, _, _, event = self.buffer.dispatch(
            rows, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=to_N1,
            topk_weights=torch.ones(to_N1.shape, device=message.device), async_finish=True)
        self.on_way[id(received)] = event, message.dtype, message.shape[1:]
        return received

    def finish(self, message: Tensor) -> Tensor:
        event, dtype, shape = self.on_way.pop(id(message))
        event.current_stream_wait()
        return from_units(message, dtype, shape)


def as_units(message: Tensor) -> Tensor:
    """View the bits of rows as bfloat16, padded to a whole number of units."""
    bits = message.reshape(len(message), message.shape[1:].numel()).contiguous().view(torch.uint8)
    return F.pad(bits, (0, ceil(bits.shape[1] / UNIT) * UNIT - bits.shape[1])).view(torch.bfloat16)


def from_units(rows: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """Undo `as_units`: rows of that dtype and row shape."""
    bits = rows.view(torch.uint8)[:, :shape.numel() * dtype.itemsize].contiguous()
    return bits.view(dtype).view(len(rows), *shape)
