"""Activation checkpointing with recorded routing decisions.

With mode `none` every block keeps what its backward needs. Otherwise a block keeps its input and is
recomputed in backward, except for its *discrete* results: the selection (`top_k`), the decision (`decide`),
the counts that ranks exchange, and the copies of them that the host has read. These are recorded and
replayed (op_record.py), so the recomputed block routes and exchanges exactly as the first one did.

    mode         recorded                              recomputed in backward
    full         discrete results                      the block; rows are dispatched once more
    selective    also matrix products, attention, and  norms, rotation, activations, row orders; nothing is
                 the rows that experts received        exchanged twice

Combined rows are only summed, so no gradient reads their values: they are neither recorded nor exchanged
again.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

import moetrain.ops.expert_linear  # noqa: F401
import moetrain.ops.grouped_experts  # noqa: F401
from moetrain.model.op_record import ALL_TO_ALL, OpRecord

# Ops that mode `selective` records in addition.
HEAVY = frozenset({
    ALL_TO_ALL, torch.ops.moetrain.peer_start.default,
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
    torch.ops.moetrain.grouped_experts.default, torch.ops.moetrain.grouped_experts_padded.default,
    torch.ops.moetrain.expert_linear.default, torch.ops.moetrain.expert_linear_padded.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
})


def recomputed(mode: str) -> Callable[..., Any] | None:
    """Build the function that runs a block with activation checkpointing.

    Args:
        mode: `none`, `selective` or `full`.

    Returns:
        `call(function, *arguments)`, which recomputes the function in backward; None for `none`.
    """
    if mode == "none":
        return None
    heavy = HEAVY if mode == "selective" else frozenset()

    def call(function: Callable, *arguments: Any) -> Any:
        kept = OpRecord(heavy, inputs=arguments)

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            # Not the whole record is replayed: recomputation stops at the last tensor that backward needs.
            return kept.record(), kept.replay(whole=False, for_backward=True)

        # There is no random state to restore: nothing draws from a global generator.
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False,
                          context_fn=contexts)

    return call
