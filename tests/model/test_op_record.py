"""Records of operators: what is written into a recorded result never reaches a replay, and never silently."""

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.model import op_record
from moetrain.model.activation_checkpointing import recomputed
from moetrain.model.op_record import OpRecord
from moetrain.ops.gating import decide, top_k
from moetrain.routers.base import RouterContext
from tests.support.training import checked_records


def test_a_record_gives_back_what_was_decided_even_if_it_would_be_decided_otherwise_now():
    kept = OpRecord()
    scores_TE = torch.randn(5, 4)
    with kept.record():
        ids_TK = decide(top_k(scores_TE, 2)[1])
    with kept.replay(whole=True):
        assert torch.equal(decide(top_k(-scores_TE, 2)[1]), ids_TK)


def test_a_record_that_is_not_used_up_is_noticed():
    kept = OpRecord()
    with kept.record():
        decide(top_k(torch.randn(5, 4), 2)[1])
    with pytest.raises(AssertionError, match="not asked for again"), kept.replay(whole=True):
        top_k(torch.randn(5, 4), 2)


def changed(write: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    """A function that writes into a product by way of something else, and returns the product."""
    def block(product: Tensor) -> Tensor:
        write(product.detach())
        return product

    return block


def write_parts(product: Tensor) -> Tensor:
    first, second = product.unsafe_chunk(2, dim=-1)
    return first.mul_(second.sigmoid()).add_(1)


CELL = nn.GRUCell(4, 2)
# What a block may do to a product [2, 3, 4] that it has computed.
WRITES = {
    "in place": lambda product: product.add_(1),
    "through data": lambda product: product.data.mul_(2) * product,
    "out": changed(lambda alias: torch.add(alias, 1, out=alias)),
    "list": changed(lambda alias: torch._foreach_mul_([alias], 3.0)),
    "index": changed(lambda alias: alias.__setitem__(0, 7.0)),
    "NumPy": changed(lambda alias: torch.from_numpy(alias.numpy()).mul_(2)),
    "unsafe parts": write_parts,
    "torch's cell": lambda product: CELL(product.flatten(0, 1), product.flatten(0, 1)[:, :2].tanh()),
}


def gradients(mode: str, write: Callable[[Tensor], Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((2, 3, 5), (4, 5)))
    parameters = x, weight, *CELL.parameters()
    call = recomputed(mode) or (lambda function, *arguments: function(*arguments))
    out = call(lambda x: write(F.linear(x, weight)).sin(), x)
    return list(torch.autograd.grad(out.sum(), parameters, materialize_grads=True))


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("write", WRITES)
def test_a_block_may_write_into_what_was_recorded(mode, write):
    with checked_records():
        ours = gradients(mode, WRITES[write])
    theirs = gradients("none", WRITES[write])
    assert all(map(torch.equal, ours, theirs)) and theirs[1].any()


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("write", ["in place", "through data", "unsafe parts"])
def test_a_block_that_writes_into_its_input_is_refused_by_the_operators_name(mode, write):
    """Also where the input is what an earlier block has recorded, such as a router's carried state."""
    weight = torch.ones(4, 5, requires_grad=True)
    product = recomputed(mode)(lambda x: F.linear(x, weight), torch.ones(2, 5))
    with pytest.raises(AssertionError, match=r"aten.(add|mul)_.Tensor writes into an input of a block"):
        recomputed(mode)(lambda y: WRITES[write](y).sin(), product)


def test_an_input_that_is_written_into_behind_the_block_is_refused():
    """torch itself looks at tensors among the arguments, not at those in records, such as a carry."""
    x, weight = torch.ones(2, 3), torch.ones(3, requires_grad=True)
    out = recomputed("full")(lambda context: (context.carry * weight).sin(), RouterContext(carry=x))
    x.add_(1)
    with pytest.raises(AssertionError, match=r"input \[2, 3\] of a block was written into"):
        out.sum().backward()


def test_decisions_that_the_block_writes_into_are_replayed_as_they_were_made():
    kept, scores_TE = OpRecord(), torch.randn(5, 4)
    with kept.record():
        ids_TK = decide(top_k(scores_TE, 2)[1])
        before_TK = ids_TK.clone()
        ids_TK[0] = -1
    with kept.replay(whole=True):
        assert torch.equal(decide(top_k(scores_TE, 2)[1]), before_TK)


def selective(block: Callable[[Tensor], Tensor]) -> Tensor:
    """A block with a product, and what it returns, not yet run backward."""
    weight = torch.ones(3, 3, requires_grad=True)
    return recomputed("selective")(lambda x: block(x @ weight), torch.ones(2, 3))


def test_a_write_behind_the_block_is_refused():
    products = []
    out = selective(lambda product: products.append(product.detach()) or product.sin())
    products[0].add_(1)
    with pytest.raises(AssertionError, match="mm.default was written into after it was kept"):
        out.sum().backward()


def test_checks_find_a_write_that_no_operator_and_no_version_counter_tells_of():
    def block(product: Tensor) -> Tensor:
        product.detach().numpy()[:] = 5.0
        return product.sin()

    selective(block).sum().backward()                    # named at the top of op_record.py
    with checked_records(), pytest.raises(AssertionError, match="mm.default changed after it was kept"):
        selective(block).sum().backward()


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checks_find_a_block_that_draws_without_a_key(mode):
    def block(x: Tensor) -> Tensor:
        noisy = x + torch.randn_like(x)
        return noisy.sin() * decide(top_k(noisy, 1)[1])

    with checked_records(), pytest.raises(AssertionError, match="draws from a generator without a key"):
        recomputed(mode)(block, torch.ones(2, 3, requires_grad=True)).sum().backward()


def test_a_record_that_nobody_replays_leaves_nothing():
    gc.collect()
    assert not op_record._RECORDED and not op_record._INPUTS
    out = selective(lambda product: product.sin())
    assert len(op_record._RECORDED) == len(op_record._INPUTS) == 1
    del out
    assert not op_record._RECORDED and not op_record._INPUTS


def test_what_nothing_writes_into_is_not_copied():
    """The copies that a guard makes would be tensors of the products' size."""
    copies = []

    class Clones(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            copies.append(func) if func is torch.ops.aten.clone.default else None
            return func(*args, **(kwargs or {}))

    with Clones():
        selective(lambda product: product.sin().relu_()).sum().backward()
    assert not copies
