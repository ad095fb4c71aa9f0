"""Experts with counts on the device: the numbers of counts on the host, and nothing waits for the host."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.ops.grouped_experts import grouped_experts
from moetrain.ops.grouped_gemm import grouped_wgrad_
from moetrain.ops.permute import plan_permutation, unpermute, unpermute_padded, values_of_rows
from moetrain.ops.route_plan import RoutePlan, route_plan
from moetrain.ops.router import RouterRule, route_tokens
from moetrain.ops.swiglu import swiglu_backward, swiglu_forward

EXPERTS, DIM, HIDDEN, SLOTS = 4, 16, 8, 2
CHOICES = {
    "all used": [[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]],
    "experts without rows": [[2, 0], [0, 2], [2, 0]],
    "all to one": [[1, -1], [1, -1], [1, -1]],
    "one token": [[3, -1]],
    "no rows": [[-1, -1], [-1, -1]],
}
NEEDS_THE_HOST = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique",
                  "repeat_interleave", "is_nonzero")


class NoHost(TorchDispatchMode):
    """Refuses operators whose result or shape the host must wait for."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert not any(name in str(function) for name in NEEDS_THE_HOST), f"{function} waits for the host"
        return function(*arguments, **keywords or {})


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype).requires_grad_()
            for shape in ((EXPERTS, 2 * HIDDEN, DIM), (EXPERTS, DIM, HIDDEN))]


def padded_layer(x_TD: Tensor, weights_TK: Tensor, plan: RoutePlan, gate_up: Tensor, down: Tensor) -> Tensor:
    counts = plan.ends_P.diff(prepend=plan.ends_P.new_zeros(1))
    rows_RD = grouped_experts(x_TD, values_of_rows(weights_TK, plan.permutation), gate_up, down, counts,
                              plan.permutation)
    return unpermute_padded(rows_RD, plan.permutation)


@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize("choice", CHOICES)
def test_values_and_every_gradient_are_those_of_counts_on_the_host(choice, alignment):
    ids_TK = torch.tensor(CHOICES[choice])
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(len(ids_TK), DIM, generator=generator, requires_grad=True)
    weights_TK = torch.rand(ids_TK.shape, generator=generator, requires_grad=True)
    leaves = [x_TD, weights_TK, *parameters()]
    exact = plan_permutation(ids_TK, EXPERTS)
    weights_R = weights_TK.flatten().index_select(0, exact.slots_R)
    expected = unpermute(grouped_experts(x_TD, weights_R, *leaves[2:], exact.counts_P.tolist(), exact), exact)
    got = padded_layer(x_TD, weights_TK, route_plan(ids_TK, EXPERTS, ids_TK.numel() + 70, alignment),
                       *leaves[2:])
    torch.testing.assert_close(got, expected)
    grad_TD = torch.randn(x_TD.shape, generator=generator)
    for ours, theirs in zip(torch.autograd.grad(got, leaves, grad_TD),
                            torch.autograd.grad(expected, leaves, grad_TD)):
        torch.testing.assert_close(ours, theirs)


def test_padding_may_hold_anything():
    """Rows that arrive ordered by expert, as an exchange of static size leaves them."""
    x_RD, weights_R, (gate_up, down) = torch.randn(9, DIM), torch.rand(9), parameters()
    counts = torch.tensor([2, 0, 3, 1])
    clean = [x_RD[:6].clone().requires_grad_(), weights_R[:6].clone().requires_grad_(), gate_up, down]
    x_RD[6:] = torch.nan
    weights_R[6:] = torch.nan
    dirty = [x_RD.requires_grad_(), weights_R.requires_grad_(), gate_up, down]
    expected, got = grouped_experts(*clean, counts.tolist()), grouped_experts(*dirty, counts)
    torch.testing.assert_close(got[:6], expected)
    grad_RD = torch.full((9, DIM), torch.nan)
    grad_RD[:6] = torch.randn(6, DIM)
    theirs, ours = torch.autograd.grad(expected, clean, grad_RD[:6]), torch.autograd.grad(got, dirty, grad_RD)
    for mine, truth in zip(ours[:2], theirs[:2]):
        torch.testing.assert_close(mine[:6], truth)
        assert not mine[6:].any()                        # zeros, not NaN
    for mine, truth in zip(ours[2:], theirs[2:]):
        torch.testing.assert_close(mine, truth)


def routed_layer(x_TD: Tensor, logits_TE: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    routed = route_tokens(logits_TE, RouterRule(SLOTS))
    plan = route_plan(routed.ids_TK, EXPERTS, routed.ids_TK.numel())
    return padded_layer(x_TD, routed.weights_TK, plan, gate_up, down).sum() + routed.sums.prob_sum_E[0]


def test_a_routed_layer_and_its_backward_never_wait_for_the_host():
    leaves = [torch.randn(6, DIM, requires_grad=True), torch.randn(6, EXPERTS, requires_grad=True),
              *parameters()]
    with pytest.raises(AssertionError, match="waits for the host"), NoHost():
        plan_permutation(torch.tensor([[0], [1]]), 2)    # the guard sees what it should
    with FakeTensorMode(allow_non_fake_inputs=False) as fakes:
        loss = routed_layer(*[fakes.from_tensor(leaf) for leaf in leaves])
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_references_under_the_ops_never_wait_for_the_host_either(dtype):
    from moetrain.ops import grouped_experts as experts, permute, route_plan as plans, router

    x_TD, logits_TE, (gate_up, down) = torch.randn(6, DIM, dtype=dtype), torch.randn(6, EXPERTS), parameters()
    with torch.no_grad(), NoHost():
        weights_TK, lse_T, _, _, _, ids_TK, *_ = router._reference(logits_TE, None, None, None,
                                                                   *RouterRule(SLOTS, groups=2))
        router._reference_backward(weights_TK, logits_TE[0], lse_T[0], None, logits_TE, ids_TK, lse_T, None,
                                   False, True, 1.0)
        slots_R, rows_TK, counts_e, _ = plans._reference(ids_TK, EXPERTS, 14, 1)
        weights_R = torch.rand(14)
        inputs = (x_TD, slots_R, rows_TK, weights_R, gate_up, down, None, None)
        out_RD, gate_up_RG = experts._reference(*inputs, counts_e)
        permute.sum_padded(out_RD, slots_R, rows_TK)
        experts._reference_backward(permute.gather_padded(x_TD, slots_R, rows_TK), *inputs, gate_up_RG,
                                    counts_e, [True] * 3)


def test_only_x_h_weights_and_indices_are_kept():
    leaves = [torch.randn(6, DIM, requires_grad=True), torch.rand(6, SLOTS, requires_grad=True),
              *parameters()]
    ids_TK = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2], [3, 1]])
    plan = route_plan(ids_TK, EXPERTS, 12)
    weights_R = values_of_rows(leaves[1], plan.permutation).detach().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor,
                                                  lambda tensor: tensor):
        grouped_experts(leaves[0], weights_R, *leaves[2:], plan.permutation.counts_P, plan.permutation)
    real = sorted(tuple(tensor.shape) for tensor in kept if tensor.is_floating_point())
    assert real == sorted([(6, DIM), (12, 2 * HIDDEN), (12,), *(tuple(leaf.shape) for leaf in leaves[2:])])


def test_counts_on_the_device_want_a_grouped_product():
    x_RD, (gate_up, down) = torch.randn(3, DIM, dtype=torch.float64), parameters(torch.float64)
    with pytest.raises(AssertionError, match="float32 or bfloat16"):
        grouped_experts(x_RD, torch.rand(3, dtype=torch.float64), gate_up, down, torch.tensor([1, 1, 1, 0]))


def test_used_rows_alone_get_an_activation():
    h, grad, weights = torch.randn(5, 6), torch.randn(5, 3), torch.rand(5)
    used = torch.tensor([3], dtype=torch.int32)
    expected = [swiglu_forward(h[:3], weights[:3]), *swiglu_backward(grad[:3].clone(), h[:3], weights[:3])]
    h[3:] = grad[3:] = torch.nan
    got = [swiglu_forward(h, weights, used), *swiglu_backward(grad.clone(), h, weights, used)]
    for mine, truth in zip(got, expected):
        torch.testing.assert_close(mine[:3], truth)
        assert not mine[3:].any()


def test_a_weight_gradient_is_added_in_float32():
    a, b = torch.randn(5, 8).bfloat16(), torch.randn(5, 16).bfloat16()
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    acc = torch.ones(3, 8, 16)
    grouped_wgrad_(a, b, ends, acc)
    expected = torch.stack([a[:2].float().T @ b[:2].float(), torch.zeros(8, 16),
                            a[2:].float().T @ b[2:].float()]) + 1
    torch.testing.assert_close(acc, expected)


def test_it_is_traced_as_one_graph():
    leaves = [torch.randn(6, DIM, requires_grad=True), torch.randn(6, EXPERTS, requires_grad=True),
              *parameters()]
    expected = torch.autograd.grad(routed_layer(*leaves), leaves)
    compiled = torch.compile(routed_layer, backend="aot_eager", fullgraph=True)
    for mine, truth in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
        torch.testing.assert_close(mine, truth)


def test_the_ops_are_well_formed():
    ops, (gate_up, down) = torch.ops.moetrain, parameters()
    plan = route_plan(torch.tensor(CHOICES["all used"]), EXPERTS, 12)
    x_TD, weights_R = torch.randn(5, DIM, requires_grad=True), torch.rand(12, requires_grad=True)
    inputs = (x_TD, *plan.permutation[:2], weights_R, gate_up, down, None, None)
    # test_utils: rows behind the last are uninitialised, so values cannot be compared with a second run
    torch.library.opcheck(ops.grouped_experts_padded, (*inputs, plan.permutation.counts_P),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    used = torch.tensor([3], dtype=torch.int32)
    torch.library.opcheck(ops.swiglu, (torch.randn(5, 6), torch.rand(5), used))
    torch.library.opcheck(ops.swiglu_backward, (torch.randn(5, 3), torch.randn(5, 6), torch.rand(5), None))
    torch.library.opcheck(ops.grouped_wgrad_, (torch.randn(5, 8), torch.randn(5, 16),
                                               torch.tensor([2, 5], dtype=torch.int32),
                                               torch.zeros(2, 8, 16)))
