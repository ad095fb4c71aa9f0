"""Activation checkpointing with recorded routing decisions, and the record of the count pass.

With mode `none` every block keeps what its backward needs. Otherwise a block keeps its input and is
recomputed in backward, except for its *discrete* results: the selection (`top_k`), the decision (`decide`),
the counts that ranks exchange, and the copies of them that the host has read. These are recorded and
replayed, so the recomputed block routes and exchanges exactly as the first one did.

    mode         recorded                              recomputed in backward
    full         discrete results                      the block; rows are dispatched once more
    selective    also matrix products, attention, and  norms, rotation, activations, row orders; nothing is
                 the rows that experts received        exchanged twice

Combined rows are only summed, so no gradient reads their values: they are neither recorded nor exchanged
again.

While a block runs, a dispatch mode sees every operator. It records the results of those in `SAVED` (and
`HEAVY`) in order, and returns them again when the block is recomputed. torch's own selective checkpointing
requires that *every* operator occurs as often the second time, which the operators of FSDP2's hooks inside a
block do not. A *count pass* (train/micro_batches.py) uses the same record: the forward pass with gradients
replays the decisions of the one without.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import moetrain.comm.exchange.flat  # noqa: F401  (registers the collectives that are named below)
import moetrain.comm.exchange.peer  # noqa: F401
import moetrain.ops.gating  # noqa: F401
import moetrain.ops.grouped_experts  # noqa: F401
import moetrain.ops.host_read  # noqa: F401
import moetrain.ops.router  # noqa: F401

_ALL_TO_ALL = torch.ops._c10d_functional.all_to_all_single.default
# Ops with discrete results, which must be the same when a block is recomputed.
SAVED = frozenset({torch.ops.moetrain.top_k.default, torch.ops.moetrain.decide.default,
                   torch.ops.moetrain.router.default, torch.ops.moetrain.read_host.default})
# Ops that mode `selective` records in addition.
HEAVY = frozenset({
    _ALL_TO_ALL, torch.ops.moetrain.peer_start.default,
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
    torch.ops.moetrain.grouped_experts.default, torch.ops.moetrain.grouped_experts_padded.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
})


# Ops whose result backward never reads. Recomputation returns NaN for them instead of communicating again.
UNREAD = frozenset({torch.ops.moetrain.all_to_all_single_unread.default,
                    torch.ops.moetrain.peer_start_unread.default})


def is_discrete(op: Any, arguments: tuple) -> bool:
    """Whether an op is a decision or an exchange of counts. An all-to-all of int64 is never one of rows."""
    return op in SAVED or op is _ALL_TO_ALL and arguments[0].dtype == torch.int64


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

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        kept = OpRecord(heavy)
        # Not the whole record is replayed: recomputation stops at the last tensor that backward needs.
        return kept.record(), kept.replay(whole=False, for_backward=True)

    def call(function: Callable, *arguments: Any) -> Any:
        # There is no random state to restore: nothing draws from a global generator.
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False,
                          context_fn=contexts)

    return call


class OpRecord:
    """Record of the discrete results of one pass, replayed once in another.

    Args:
        heavy: further ops whose results are recorded.
    """

    def __init__(self, heavy: frozenset = frozenset()) -> None:
        self.heavy = heavy
        self._results: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def record(self) -> Iterator[None]:
        """Context in which results are recorded."""
        with _Mode(self._wanted, self._keep):
            yield

    @contextmanager
    def replay(self, *, whole: bool, for_backward: bool = False) -> Iterator[None]:
        """Context in which ops take their results from the record; after its end they are computed.

        Args:
            whole: assert that the whole record was used.
            for_backward: only backward reads the results of this pass, so ops in UNREAD return NaN.
        """
        with _Mode(self._wanted, self._give), (
                _Mode(lambda op, _: op in UNREAD, _unread) if for_backward else nullcontext()):
            yield
        assert not whole or not self._results, f"{len(self._results)} results were not asked for again"

    def _wanted(self, op: Any, arguments: tuple) -> bool:
        return op in self.heavy or is_discrete(op, arguments)

    def _keep(self, op: Any, arguments: tuple, keywords: dict) -> Any:
        result = op(*arguments, **keywords)
        self._results.append(
            (op, tree_map_only(Tensor, lambda tensor: (_detached(tensor), tensor._version), result)))
        return result

    def _give(self, op: Any, arguments: tuple, keywords: dict) -> Any:
        if not self._results:
            return op(*arguments, **keywords)
        recorded, result = self._results.popleft()
        assert recorded is op, f"{recorded} ran where {op} runs now"
        return _unchanged(op, result)


def _unread(op: Any, arguments: tuple, keywords: dict) -> Tensor:
    """Result of an op in UNREAD without its exchange: NaN, in the shape of the received rows."""
    message, received, *_ = arguments
    return message.new_full((sum(received), *message.shape[1:]), float("nan"))


def _detached(tensor: Tensor) -> Tensor:
    """Alias of a tensor without the graph that it is about to get, sharing its version counter.

    In-place writes to either raise the counter, so they are noticed. A dispatch mode runs with the key
    ADInplaceOrView excluded, and a view made there has a counter of its own (seen on torch 2.13). So the key
    is included again, as in torch.utils.checkpoint.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _unchanged(op: Any, kept: Any) -> Any:
    """Return the recorded tensors of a result, one or a tuple of them, if nothing has written to them."""
    if isinstance(kept, tuple) and not isinstance(kept[0], Tensor):
        return tuple(_unchanged(op, part) for part in kept)
    tensor, version = kept
    assert tensor._version == version, f"the result of {op} was written into after it was kept"
    return tensor


class _Mode(TorchDispatchMode):
    """Dispatch mode that calls `handle(op, arguments, keywords)` for wanted ops and runs the others."""

    def __init__(self, wanted: Callable[[Any, tuple], bool],
                 handle: Callable[[Any, tuple, dict], Any]) -> None:
        super().__init__()
        self.wanted, self.handle = wanted, handle

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.wanted(func, args):
            return self.handle(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
