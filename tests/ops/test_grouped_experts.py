"""The routed experts as one op, against a loop over rows in float64: outputs, gradients, what is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.ops.grouped_experts import grouped_experts
from moetrain.ops.permute import Permutation, plan_permutation

EXPERTS = 4
CHOICES = {
    "all used": [[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]],
    "experts without rows": [[2, 0], [0, 2], [2, 0]],
    "all to one": [[1], [1], [1]],
    "unused slots": [[3, -1], [-1, -1], [3, 1]],
    "no rows": [[-1, -1], [-1, -1]],
    "no tokens": [],
}
WIDTHS = [(16, 8), (7, 5)]                              # what grouped_mm takes, and what it does not
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def make_order(choice: str) -> Permutation:
    ids = CHOICES[choice]
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(len(ids), len(ids[0]) if ids else 2)
    return plan_permutation(ids_TK, EXPERTS)


def make_inputs(order: Permutation, widths: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """x, weights, gate_up, down: parameters and weights float32 or better, x in `dtype`."""
    dim, hidden = widths
    generator = torch.Generator().manual_seed(0)
    storage = torch.float64 if dtype == torch.float64 else torch.float32
    x_ND = torch.randn(len(order.rows_TK), dim, generator=generator).to(dtype)
    others = (torch.rand(len(order.slots_R), generator=generator),
              torch.randn(EXPERTS, 2 * hidden, dim, generator=generator) / dim ** 0.5,
              torch.randn(EXPERTS, dim, hidden, generator=generator) / hidden ** 0.5)
    return [x_ND.requires_grad_(), *(tensor.to(storage).requires_grad_() for tensor in others)]


def by_loop(x_ND: Tensor, weights_R: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor,
            order: Permutation) -> Tensor:
    expert_R = torch.repeat_interleave(torch.arange(EXPERTS), order.counts_P).tolist()
    outputs = []
    for row, slot in enumerate(order.slots_R.tolist()):
        gate, up = (gate_up_eGD[expert_R[row]] @ x_ND[slot // order.rows_TK.shape[1]]).chunk(2)
        outputs.append(down_eDF[expert_R[row]] @ (F.silu(gate) * up) * weights_R[row])
    # zeros for what has no row
    every = sum(tensor.sum() for tensor in (x_ND, weights_R, gate_up_eGD, down_eDF)) * 0
    return torch.stack(outputs) + every if outputs else x_ND.new_zeros(0, x_ND.shape[1]) + every


def assert_near(ours: Tensor, truth: Tensor, tolerance: float) -> None:
    assert ours.shape == truth.shape
    scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_outputs_and_every_gradient_are_those_of_a_loop_over_rows(dtype, widths, choice):
    order = make_order(choice)
    inputs = make_inputs(order, widths, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out_RD = grouped_experts(*inputs, order.counts_P.tolist(), order)
    truth_RD = by_loop(*exact, order)
    grad_RD = torch.randn(out_RD.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(out_RD, inputs, grad_RD)
    truths = torch.autograd.grad(truth_RD, exact, grad_RD.double())
    assert out_RD.dtype == dtype and [g.dtype for g in gradients] == [tensor.dtype for tensor in inputs]
    for ours, truth in zip((out_RD, *gradients), (truth_RD, *truths)):
        assert_near(ours, truth, TOLERANCE[dtype])


def test_gradients_pass_gradcheck():
    for choice in ("all used", "unused slots"):
        order = make_order(choice)
        inputs = make_inputs(order, (3, 2), torch.float64)
        assert torch.autograd.gradcheck(
            lambda *tensors: grouped_experts(*tensors, order.counts_P.tolist(), order), inputs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_already_in_order_need_none(dtype):
    order = make_order("all used")
    x_ND, *others = make_inputs(order, (16, 8), dtype)
    rows_RD = x_ND.detach()[order.slots_R // 2].requires_grad_()
    counts_e = order.counts_P.tolist()
    through = grouped_experts(x_ND, *others, counts_e, order)
    direct = grouped_experts(rows_RD, *others, counts_e)
    assert through.equal(direct)
    grad_RD = torch.randn_like(direct)
    (d_x_ND,) = torch.autograd.grad(through, x_ND, grad_RD)
    (d_rows_RD,) = torch.autograd.grad(direct, rows_RD, grad_RD)
    assert_near(d_x_ND, d_rows_RD.double()[order.rows_TK].sum(1), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_strides_do_not_matter(dtype):
    order = make_order("all used")
    inputs = make_inputs(order, (16, 8), dtype)
    strided = [torch.stack([tensor.detach(), tensor.detach()], -1)[..., 0].requires_grad_()
               for tensor in inputs]
    counts_e = order.counts_P.tolist()
    for x, others in ((inputs[0], inputs[1:]), (strided[0], strided[1:])):
        assert x.is_contiguous() == (x is inputs[0])
        out_RD = grouped_experts(x, *others, counts_e, order)
        out_RD.sum().backward()                          # an expanded gradient: every stride 0
    for tensor, other in zip(inputs, strided):
        torch.testing.assert_close(other.grad, tensor.grad)
    ones_RD = torch.ones(len(order.slots_R), 16, dtype=dtype)
    dense = torch.autograd.grad(grouped_experts(*inputs, counts_e, order), inputs, ones_RD)
    for tensor, truth in zip(inputs, dense):
        torch.testing.assert_close(tensor.grad, truth)


def test_the_same_to_the_last_bit_twice_and_when_recomputed():
    order = make_order("all used")
    inputs = make_inputs(order, (16, 8), torch.float32)

    def run(*tensors: Tensor) -> Tensor:
        return grouped_experts(*tensors, order.counts_P.tolist(), order).square().sum()

    first, second, recomputed = (torch.autograd.grad(loss, inputs) for loss in (
        run(*inputs), run(*inputs), checkpoint(run, *inputs, use_reentrant=False)))
    for one, two, three in zip(first, second, recomputed):
        assert one.equal(two) and one.equal(three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_x_and_the_gate_and_up_halves_are_kept(dtype):
    order = make_order("all used")
    inputs = make_inputs(order, (16, 8), dtype)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    given = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, order.slots_R, order.rows_TK)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grouped_experts(*inputs, order.counts_P.tolist(), order)
    new = [tensor for address, tensor in kept.items() if address not in given]
    rows, hidden = len(order.slots_R), 8
    assert [(tensor.shape, tensor.dtype) for tensor in new] == [((rows, 2 * hidden), dtype)]


def test_gradients_that_nobody_wants_are_none():
    order = make_order("all used")
    x_ND, weights_R, gate_up, down = make_inputs(order, (16, 8), torch.float32)
    out_RD = grouped_experts(x_ND, weights_R.detach(), gate_up.detach(), down, order.counts_P.tolist(), order)
    d_x_ND, d_down = torch.autograd.grad(out_RD.sum(), (x_ND, down))
    assert d_x_ND.any() and d_down.any()


def test_the_op_is_well_formed():
    order = make_order("unused slots")
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(order, (16, 8), dtype)
        ends = (None, None, order.counts_P.tolist())
        torch.library.opcheck(torch.ops.moetrain.grouped_experts,
                              (inputs[0], order.slots_R, order.rows_TK, *inputs[1:], *ends))
        x_ND, weights_R, *matrices = inputs              # one at home, the others copies
        split = [[matrix.detach()[cut].requires_grad_() for matrix in matrices]
                 for cut in (slice(1), slice(1, None))]
        torch.library.opcheck(torch.ops.moetrain.grouped_experts,
                              (x_ND, order.slots_R, order.rows_TK, weights_R, *split[0],
                                                                  *split[1], ends[-1]))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("homes", range(EXPERTS + 1))
def test_homes_and_copies_are_the_experts_in_two_places(choice, homes):
    order = make_order(choice)
    x_ND, weights_R, gate_up, down = make_inputs(order, (7, 5), torch.float64)
    whole = (x_ND, weights_R, gate_up, down)
    out = grouped_experts(*whole, order.counts_P.tolist(), order)
    expected = torch.autograd.grad(out.square().sum(), whole)
    parts = [[matrix.detach()[cut].requires_grad_() for matrix in (gate_up, down)]
             for cut in (slice(homes), slice(homes, None))]
    split = grouped_experts(x_ND, weights_R, *parts[0], order.counts_P.tolist(), order,
                            copies=tuple(parts[1]))
    assert split.equal(out)
    d_x, d_weights, *d = torch.autograd.grad(split.square().sum(), (x_ND, weights_R, *parts[0], *parts[1]))
    assert d_x.equal(expected[0]) and d_weights.equal(expected[1])
    for matrix in (0, 1):
        assert torch.cat([d[matrix], d[2 + matrix]]).equal(expected[2 + matrix])
