"""Record of the results of operators in one pass, replayed in another; and what keeps it from being fooled.

Activation checkpointing (activation_checkpointing.py) replays a block's record when the block is recomputed
in backward; a count pass (train/micro_batches.py) replays the decisions of a pass without gradients. While
either runs, a dispatch mode sees every operator. It records the results of some in order, and returns them
again. torch's own selective checkpointing requires that *every* operator occurs as often the second time,
which the operators of FSDP2's hooks inside a block do not.

**Results that are written into.** A block may write into a recorded result, also where torch's version
counter does not see it: into `.data`, into the parts of `unsafe_split` (nn.GRUCell, nn.LSTMCell), or into
what `F.linear` returns for a batch of matrices. The dispatch mode finds the writing operator by its schema
and copies the recorded result before it runs, so the replay gives the result as it was. Where nothing is
written, nothing is copied. An operator that writes into an input of a block, from which the block is
recomputed, is refused by its name. A write that the mode does not see, because it happens outside of every
recorded or replayed block, raises the version counter and is refused at the replay. What neither notices:

    outside of blocks    an unsafe write, as above, into a recorded result or an input of a block
    without an operator  a write of NumPy's or ctypes', and an operator that writes into an argument although
                         its schema does not say so

With `MOETRAIN_CHECK_RECORDS=1` in the environment (the tests of routers set it) a record keeps a checksum of
each result, and refuses the replay if it has changed. It also computes each result again in backward and
refuses other numbers: those of a block that draws from a generator without a key, or that reads what changes.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakValueDictionary
from zlib import crc32

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import moetrain.comm.exchange.flat  # noqa: F401  (registers the collectives that are named below)
import moetrain.comm.exchange.peer  # noqa: F401
import moetrain.ops.gating  # noqa: F401
import moetrain.ops.host_read  # noqa: F401
import moetrain.ops.router  # noqa: F401

ALL_TO_ALL = torch.ops._c10d_functional.all_to_all_single.default
# Ops with discrete results, which must be the same when a block is recomputed.
SAVED = frozenset({torch.ops.moetrain.top_k.default, torch.ops.moetrain.decide.default,
                   torch.ops.moetrain.router.default, torch.ops.moetrain.read_host.default})
# Ops whose result backward never reads. Recomputation returns NaN for them instead of communicating again.
UNREAD = frozenset({torch.ops.moetrain.all_to_all_single_unread.default,
                    torch.ops.moetrain.peer_start_unread.default})
# Recorded ops that other ranks take part in, or that the host waits for: what they return may arrive later.
COMMUNICATING = frozenset({ALL_TO_ALL, torch.ops.moetrain.peer_start.default,
                           torch.ops.moetrain.read_host.default})
# Ops into whose result the exchange itself writes what arrives.
WRITTEN_BY_ARRIVAL = frozenset({torch.ops.moetrain.peer_start.default})
CHECK = "MOETRAIN_CHECK_RECORDS"


def is_discrete(op: Any, arguments: tuple) -> bool:
    """Whether an op is a decision or an exchange of counts. An all-to-all of int64 is never one of rows."""
    return op in SAVED or op is ALL_TO_ALL and arguments[0].dtype == torch.int64


class OpRecord:
    """Record of the discrete results of one pass, replayed once in another.

    Args:
        heavy: further ops whose results are recorded.
        inputs: what the second pass starts from again: tensors, and records of tensors.
    """

    def __init__(self, heavy: frozenset = frozenset(), inputs: tuple = ()) -> None:
        self.heavy = heavy
        self._results: deque[_Recorded] = deque()
        self._inputs = _Inputs(inputs)
        self._checked, self._computed_again = records_checked(), False

    @contextmanager
    def record(self) -> Iterator[None]:
        """Context in which results are recorded."""
        with _Mode(self._wanted, self._keep):
            yield
        for result in self._results if self._checked else ():
            result.add_checksums()                       # of exchanges, whose rows have arrived by now

    @contextmanager
    def replay(self, *, whole: bool, for_backward: bool = False) -> Iterator[None]:
        """Context in which ops take their results from the record; after its end they are computed.

        Args:
            whole: assert that the whole record was used.
            for_backward: only backward reads the results of this pass, so ops in UNREAD return NaN.
        """
        self._inputs.release()
        self._computed_again = self._checked and for_backward
        with _Mode(self._wanted, self._give), (
                _Mode(lambda op, _: op in UNREAD, _unread) if for_backward else nullcontext()):
            yield
        assert not whole or not self._results, f"{len(self._results)} results were not asked for again"

    def _wanted(self, op: Any, arguments: tuple) -> bool:
        return op in self.heavy or is_discrete(op, arguments)

    def _keep(self, op: Any, arguments: tuple, keywords: dict) -> Any:
        result = op(*arguments, **keywords)
        recorded = _Recorded(op, result)
        if self._checked and op not in COMMUNICATING:
            recorded.add_checksums()
        self._results.append(recorded)
        return result

    def _give(self, op: Any, arguments: tuple, keywords: dict) -> Any:
        if not self._results:
            return op(*arguments, **keywords)
        recorded = self._results.popleft()
        assert recorded.op is op, f"{recorded.op} ran where {op} runs now"
        result = recorded.take()
        if self._computed_again and op not in COMMUNICATING:
            _assert_same(op, op(*arguments, **keywords), result)
        return result


class _Inputs:
    """Input tensors of a block that is to run again, into which nothing may write until then."""

    def __init__(self, arguments: tuple) -> None:
        self.tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        self.versions = [tensor._version for tensor in self.tensors]
        _INPUTS.update((address_of(tensor), self) for tensor in self.tensors)

    def release(self) -> None:
        """Let the tensors go, if nothing has written into them."""
        for tensor, version in zip(self.tensors, self.versions):
            assert tensor._version == version, (
                f"an input {list(tensor.shape)} of a block was written into before the block was recomputed")
        self.tensors = []


class _Kept(NamedTuple):
    """A tensor of a recorded result.

    Attributes:
        tensor: alias of the tensor, or a copy of its own once the block has written into the tensor.
        version: version of the alias when it was made.
        checksum: of its bytes; None unless records are checked.
    """

    tensor: Tensor
    version: int
    checksum: int | None = None


class _Recorded:
    """The recorded result of one op: a tensor, or a tuple of tensors and others.

    No two of them share memory, so one knows by the address of a tensor's memory which result lies there.
    """

    def __init__(self, op: Any, result: Any) -> None:
        self.op = op
        leaves, self.structure = tree_flatten(result)
        self.leaves = [self._kept(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def _kept(self, tensor: Tensor) -> _Kept:
        alias, address = _detached(tensor), address_of(tensor)
        if _RECORDED.get(address, self) is not self:
            return _Kept(alias.clone(), 0)               # an op that has returned an earlier result
        if address and self.op not in WRITTEN_BY_ARRIVAL:
            _RECORDED[address] = self
        return _Kept(alias, alias._version)

    def before_write(self, address: int) -> None:
        """Copy the tensors at an address, into which an operator is about to write."""
        del _RECORDED[address]
        for number, kept in enumerate(self.leaves):
            if isinstance(kept, _Kept) and address_of(kept.tensor) == address:
                if kept.tensor._version == kept.version:  # otherwise `take` refuses it
                    self.leaves[number] = kept._replace(tensor=kept.tensor.clone(), version=0)

    def add_checksums(self) -> None:
        """Add the checksums of all tensors that have none."""
        self.leaves = [leaf._replace(checksum=_checksum(leaf.tensor))
                       if isinstance(leaf, _Kept) and leaf.checksum is None else leaf for leaf in self.leaves]

    def take(self) -> Any:
        """Return the result, if nothing has written into it unnoticed."""
        return tree_unflatten([self._unchanged(leaf) if isinstance(leaf, _Kept) else leaf
                               for leaf in self.leaves], self.structure)

    def _unchanged(self, kept: _Kept) -> Tensor:
        tensor, version, checksum = kept
        assert tensor._version == version, f"the result of {self.op} was written into after it was kept"
        assert checksum is None or checksum == _checksum(tensor), (
            f"the result of {self.op} changed after it was kept, and torch's version counter did not see it")
        return tensor


# Recorded results that are still to be replayed, and inputs of blocks, by the address of their memory.
_RECORDED: WeakValueDictionary[int, _Recorded] = WeakValueDictionary()
_INPUTS: WeakValueDictionary[int, _Inputs] = WeakValueDictionary()


def records_checked() -> bool:
    """Whether records keep checksums, see the top of the file."""
    return os.environ.get(CHECK, "0") not in ("", "0")


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


def address_of(tensor: Tensor) -> int:
    """Address of the memory that a tensor or a view of it lies in; 0 without memory."""
    return tensor.untyped_storage().data_ptr()


def _checksum(tensor: Tensor) -> int:
    return crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _assert_same(op: Any, again: Any, result: Any) -> None:
    """Assert that an op has given the recorded numbers again, bit by bit."""
    for number, kept in zip(tree_leaves(again), tree_leaves(result), strict=True):
        assert not isinstance(kept, Tensor) or _checksum(number) == _checksum(kept), (
            f"{op} gave other numbers when its block was recomputed: the block draws from a generator "
            "without a key, or reads what has changed since")


@cache
def _written(op: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an op writes into, by its schema."""
    if op is torch.ops.aten.record_stream.default:       # it only marks them
        return ()
    return tuple((position, argument.name) for position, argument in enumerate(op._schema.arguments)
                 if argument.alias_info is not None and argument.alias_info.is_write)


def _before_writes(op: Any, arguments: tuple, keywords: dict) -> None:
    """Copy the recorded results that an op is about to write into; refuse to write into inputs of blocks."""
    for position, name in _written(op):
        value = arguments[position] if position < len(arguments) else keywords.get(name)
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            address = address_of(tensor) if isinstance(tensor, Tensor) else 0
            assert not address or address not in _INPUTS, (
                f"{op} writes into an input of a block, from which it is recomputed; write into a copy")
            if address in _RECORDED:
                _RECORDED[address].before_write(address)


class _Mode(TorchDispatchMode):
    """Dispatch mode that calls `handle(op, arguments, keywords)` for wanted ops and runs the others."""

    def __init__(self, wanted: Callable[[Any, tuple], bool],
                 handle: Callable[[Any, tuple, dict], Any]) -> None:
        super().__init__()
        self.wanted, self.handle = wanted, handle

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.wanted(func, args):
            return self.handle(func, args, kwargs or {})
        if _written(func):
            _before_writes(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
