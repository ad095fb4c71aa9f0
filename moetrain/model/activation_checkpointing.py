"""Activation checkpointing that never routes twice, and the count pass.

With `none` every block keeps what its backward needs. Otherwise a block keeps its input and computes the rest again in
backward, but for what is *discrete*: the selection (`top_k`), the decision (`decide`), the counts that ranks exchange and what the
host has read of them are saved and replayed, so the recomputed block routes and exchanges exactly as the first one did.

    full         only that                                 rows travel to the experts once more in backward
    selective    also products, attention and the rows     norms, rotation, activations and row orders are computed again
                 that came to the experts                  and nothing travels twice

Rows on their way back from the experts are sums that no gradient asks for: they are neither kept nor sent again.

How: while a block runs, a dispatch mode looks at every operator; the results of those in `SAVED` (and `HEAVY`) are kept in
order and handed out again when the block is recomputed. (torch's own selective checkpointing demands that *every* operator
occurs as often the second time, which FSDP2's hooks inside a block do not.) A *count pass* (train/micro_batches.py) uses the same
record: what a forward pass without gradients decided, the one with gradients takes from there.
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
# Discrete: results that must be the same the second time.
SAVED = frozenset({torch.ops.moetrain.top_k.default, torch.ops.moetrain.decide.default, torch.ops.moetrain.router.default,
                   torch.ops.moetrain.read_host.default})
# What `selective` keeps besides.
HEAVY = frozenset({
    _ALL_TO_ALL, torch.ops.moetrain.peer_start.default,
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
    torch.ops.moetrain.grouped_experts.default, torch.ops.moetrain.grouped_experts_padded.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
})


# What backward never reads: recomputing gives numbers that are none instead.
UNREAD = frozenset({torch.ops.moetrain.all_to_all_single_unread.default, torch.ops.moetrain.peer_start_unread.default})


def is_discrete(op: Any, arguments: tuple) -> bool:
    """A decision, or an exchange of counts: what travels as whole numbers is never data."""
    return op in SAVED or op is _ALL_TO_ALL and arguments[0].dtype == torch.int64


def recomputed(mode: str) -> Callable[..., Any] | None:
    """How a block runs: `call(function, *arguments)` for `full` and `selective`, None for `none`."""
    if mode == "none":
        return None
    heavy = HEAVY if mode == "selective" else frozenset()

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        kept = OpRecord(heavy)
        # Recomputing stops at the last tensor that backward needs.
        return kept.record(), kept.replay(whole=False, for_backward=True)

    def call(function: Callable, *arguments: Any) -> Any:
        # No random state to restore: nothing draws from a global generator.
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return call


class OpRecord:
    """Results of the discrete operators of one pass, and of the operators in `heavy`: recorded once, replayed once."""

    def __init__(self, heavy: frozenset = frozenset()) -> None:
        self.heavy = heavy
        self._results: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def record(self) -> Iterator[None]:
        with _Mode(self._wanted, self._keep):
            yield

    @contextmanager
    def replay(self, *, whole: bool, for_backward: bool = False) -> Iterator[None]:
        """Every kept result comes from the record; beyond its end operators are computed. whole: it must be used up.
        for_backward: nothing else reads what comes of it."""
        with _Mode(self._wanted, self._give), (_Mode(lambda op, _: op in UNREAD, _unread) if for_backward else nullcontext()):
            yield
        assert not whole or not self._results, f"{len(self._results)} results were not asked for again"

    def _wanted(self, op: Any, arguments: tuple) -> bool:
        return op in self.heavy or is_discrete(op, arguments)

    def _keep(self, op: Any, arguments: tuple, keywords: dict) -> Any:
        result = op(*arguments, **keywords)
        self._results.append((op, tree_map_only(Tensor, lambda tensor: (_detached(tensor), tensor._version), result)))
        return result

    def _give(self, op: Any, arguments: tuple, keywords: dict) -> Any:
        if not self._results:
            return op(*arguments, **keywords)
        recorded, result = self._results.popleft()
        assert recorded is op, f"{recorded} ran where {op} runs now"
        return _unchanged(op, result)


def _unread(op: Any, arguments: tuple, keywords: dict) -> Tensor:
    message, received, *_ = arguments
    return message.new_full((sum(received), *message.shape[1:]), float("nan"))


def _detached(tensor: Tensor) -> Tensor:
    """The tensor without the graph it is about to get, and with the same version: what is written into it later shows."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _unchanged(op: Any, kept: Any) -> Any:
    """The kept tensors of a result, one or a tuple of them."""
    if isinstance(kept, tuple) and not isinstance(kept[0], Tensor):
        return tuple(_unchanged(op, part) for part in kept)
    tensor, version = kept
    assert tensor._version == version, f"the result of {op} was written into after it was kept"
    return tensor


class _Mode(TorchDispatchMode):
    """Hands the operators that are wanted to `handle` and lets the others pass."""

    def __init__(self, wanted: Callable[[Any, tuple], bool], handle: Callable[[Any, tuple, dict], Any]) -> None:
        super().__init__()
        self.wanted, self.handle = wanted, handle

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.wanted(func, args):
            return self.handle(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
