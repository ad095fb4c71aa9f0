"""Forms of experts equal a loop over tokens, whole and in chunks, with copies and with frozen parts."""

import pytest
import torch
from torch import Tensor

from moetrain.moe.bank import ExpertBank
from moetrain.moe.clamped_swiglu import ClampedSwiglu
from moetrain.moe.expert_form import ExpertForm, SwigluExpert
from moetrain.moe.normalized_expert import NormalizedExpert
from moetrain.ops import expert_linear, grouped_experts
from moetrain.ops.grouped_gemm import grouped_outer
from moetrain.ops.permute import plan_permutation, unpermute
from tests.support.expert_forms import (
    BiasedExpert,
    TernaryExpert,
    TwoMatrixExpert,
    reference,
)

DIM, EXPERT_DIM, EXPERTS = 4, 8, 3
FORMS = {
    "swiglu": SwigluExpert(dim=DIM, expert_dim=EXPERT_DIM),
    **{name: TwoMatrixExpert(dim=DIM, expert_dim=EXPERT_DIM, activation=name)
       for name in ("gelu", "relu", "squared_relu")},
    "biased": BiasedExpert(dim=DIM, expert_dim=EXPERT_DIM),
    "gpt_oss": ClampedSwiglu(dim=DIM, expert_dim=EXPERT_DIM, limit=0.7),
    "ternary": TernaryExpert(dim=DIM, expert_dim=EXPERT_DIM),
    "normalized": NormalizedExpert(dim=DIM, expert_dim=EXPERT_DIM),
}
# Experts of each token; of the second case one token has none, and one expert has no token.
CHOICES = {"all used": [[0, 1], [2, 0], [1, 2], [0, 2], [2, 1]],
           "some unused": [[2, 0], [-1, -1], [0, -1], [2, 0]], "no rows": [[-1, -1], [-1, -1]]}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


class Inputs:
    """Tokens, gate weights and a bank, all float64 and with gradients."""

    def __init__(self, form: ExpertForm, ids: list[list[int]], seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.ids_TK = torch.tensor(ids)
        self.x_TD = torch.randn(len(ids), DIM, generator=draw, dtype=torch.float64).requires_grad_()
        self.weights_TK = torch.rand(len(ids), 2, generator=draw, dtype=torch.float64).requires_grad_()
        self.bank = ExpertBank(experts=tuple(range(EXPERTS)), form=form).double()
        for parameter in self.bank.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))

    def leaves(self) -> list[Tensor]:
        return [self.x_TD, self.weights_TK, *self.bank.parameters()]

    def gradients(self, out_TD: Tensor) -> list[Tensor | None]:
        """Gradients of all leaves for an uneven loss; None for those that need none."""
        scale_TD = torch.arange(out_TD.numel(), dtype=out_TD.dtype).view_as(out_TD).cos()
        (out_TD * scale_TD).sum().backward()
        return [leaf.grad for leaf in self.leaves()]


def by_loop(inputs: Inputs) -> Tensor:
    """Sum of the outputs of each token's experts, token by token."""
    form, rows = inputs.bank.form, []
    for x_D, ids_K, weights_K in zip(inputs.x_TD, inputs.ids_TK.tolist(), inputs.weights_TK):
        own = [{name: inputs.bank.stacked(name)[expert] for name in form.shapes} for expert in range(EXPERTS)]
        outs = [reference(form, x_D, weight, own[expert])
                for expert, weight in zip(ids_K, weights_K) if expert >= 0]
        rows.append(sum(outs, 0 * x_D))
    return torch.stack(rows)


def by_form(inputs: Inputs, *, copied: int = 0, chunks: int = 0, on_device: bool = False) -> Tensor:
    """The same by the form, of which the last experts may be handed over as copies."""
    values, form = inputs.bank.values(), inputs.bank.form
    homes = [each[:EXPERTS - copied] for each in values]
    copies = tuple(each[EXPERTS - copied:] for each in values) if copied else None
    compute = form.chunks(homes, copies) if chunks else None
    outs = []
    for part in torch.arange(len(inputs.x_TD)).tensor_split(chunks or 1):
        order = plan_permutation(inputs.ids_TK[part], EXPERTS)
        weights_R = inputs.weights_TK[part].flatten().index_select(0, order.slots_R)
        counts = order.counts_P if on_device else order.counts_P.tolist()
        if compute is not None:
            rows_RD = compute(inputs.x_TD[part], weights_R, counts, order)
        else:
            rows_RD = form.compute(inputs.x_TD[part], weights_R, counts, order, homes, copies)
        outs.append(unpermute(rows_RD, order))
    return torch.cat(outs)


@every_form
@pytest.mark.parametrize("ids", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("copied, chunks", [(0, 0), (1, 0), (2, 2), (0, 3)])
def test_a_form_equals_a_loop_over_tokens(form, ids, copied, chunks) -> None:
    ours, theirs = Inputs(form, ids), Inputs(form, ids)
    out_TD, expected_TD = by_form(ours, copied=copied, chunks=chunks), by_loop(theirs)
    torch.testing.assert_close(out_TD, expected_TD, rtol=0, atol=1e-12)
    for mine, its in zip(ours.gradients(out_TD), theirs.gradients(expected_TD), strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if its is None else its, rtol=0, atol=1e-12)


@every_form
def test_gradients_are_those_of_finite_differences(form) -> None:
    inputs = Inputs(form, CHOICES["some unused"], seed=1)
    if form.QUANTIZED:                       # straight through is no derivative: the rows alone
        inputs.bank.requires_grad_(False)

    def out(x_TD, weights_TK, *parameters):
        order = plan_permutation(inputs.ids_TK, EXPERTS)
        weights_R = weights_TK.flatten().index_select(0, order.slots_R)
        return unpermute(form.compute(x_TD, weights_R, order.counts_P.tolist(), order,
                                      parameters or inputs.bank.values()), order)

    leaves = inputs.leaves()[:2] if form.QUANTIZED else inputs.leaves()
    assert torch.autograd.gradcheck(out, leaves)


@every_form
@pytest.mark.parametrize("copied, chunks", [(0, 0), (1, 0), (1, 2)])
def test_a_frozen_parameter_gets_no_gradient_and_changes_no_other(form, copied, chunks) -> None:
    whole = Inputs(form, CHOICES["all used"])
    expected = whole.gradients(by_form(whole, copied=copied, chunks=chunks))
    for frozen in range(len(form.shapes)):
        inputs = Inputs(form, CHOICES["all used"])
        list(inputs.bank.parameters())[frozen].requires_grad_(False)
        found = inputs.gradients(by_form(inputs, copied=copied, chunks=chunks))
        assert found.pop(2 + frozen) is None
        others = [each for at, each in enumerate(expected) if at != 2 + frozen]
        assert all(mine.equal(its) for mine, its in zip(found, others, strict=True))


@pytest.mark.parametrize("form", [FORMS["swiglu"], FORMS["biased"]], ids=["swiglu", "biased"])
@pytest.mark.parametrize("chunks", [0, 2])
def test_frozen_experts_cost_no_product_for_their_matrices(form, chunks, monkeypatch) -> None:
    made: list[int] = []

    def counted(a_RI, b_RO, groups):
        made.append(len(a_RI))
        return grouped_outer(a_RI, b_RO, groups)

    for module in (expert_linear, grouped_experts):
        monkeypatch.setattr(module, "grouped_outer", counted)
    for frozen in (False, True):
        inputs = Inputs(form, CHOICES["all used"])
        inputs.bank.requires_grad_(not frozen)
        made.clear()
        inputs.gradients(by_form(inputs, chunks=chunks))
        assert inputs.x_TD.grad.abs().sum() and bool(made) == (not frozen)


@every_form
def test_counts_may_stay_on_the_device(form) -> None:
    ours, theirs = Inputs(form, CHOICES["some unused"]), Inputs(form, CHOICES["some unused"])
    for inputs in (ours, theirs):
        inputs.bank.float()
    ours.x_TD.data, theirs.x_TD.data = ours.x_TD.data.float(), theirs.x_TD.data.float()
    out, expected = by_form(ours, on_device=True), by_form(theirs)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@every_form
def test_rows_behind_the_last_expert_may_hold_anything(form) -> None:
    inputs = Inputs(form, CHOICES["all used"])
    inputs.bank.float()
    clean = [torch.randn(5, DIM).requires_grad_(), torch.rand(5).requires_grad_()]
    dirty = [torch.cat([each.detach(), torch.full_like(each[:2], float("nan"))]).requires_grad_()
             for each in clean]
    found = []
    for (x_RD, weights_R), counts in ((clean, [2, 0, 3]), (dirty, torch.tensor([2, 0, 3]))):
        inputs.bank.zero_grad()
        out_RD = form.compute(x_RD, weights_R, counts, None, inputs.bank.values())
        out_RD[:5].square().sum().backward()
        found.append([out_RD[:5].detach(), x_RD.grad, weights_R.grad,
                      *(parameter.grad.clone() for parameter in inputs.bank.parameters())])
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its[:len(mine)], rtol=1e-5, atol=1e-5)
    assert not dirty[0].grad[5:].any() and not dirty[1].grad[5:].any()


def test_the_fused_op_of_swiglu_is_its_form_written_out() -> None:
    fused, plain = Inputs(FORMS["swiglu"], CHOICES["all used"]), Inputs(FORMS["swiglu"], CHOICES["all used"])
    out_TD = by_form(fused)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SwigluExpert, "compute", ExpertForm.compute)
        expected_TD = by_form(plain)
    torch.testing.assert_close(out_TD, expected_TD, rtol=0, atol=1e-12)
    for mine, its in zip(fused.gradients(out_TD), plain.gradients(expected_TD), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_have_the_dtype_of_the_rows_and_gradients_that_of_the_parameters(dtype) -> None:
    inputs = Inputs(FORMS["biased"], CHOICES["all used"])
    inputs.bank.float()
    order = plan_permutation(inputs.ids_TK, EXPERTS)
    weights_R = inputs.weights_TK.flatten().index_select(0, order.slots_R).float()
    out_RD = inputs.bank.form.compute(inputs.x_TD.to(dtype), weights_R, order.counts_P.tolist(), order,
                                      inputs.bank.values())
    out_RD.float().sum().backward()
    assert out_RD.dtype == dtype
    assert all(parameter.grad.dtype == torch.float32 for parameter in inputs.bank.parameters())


def test_a_form_counts_its_numbers_and_operations() -> None:
    assert FORMS["swiglu"].numbers == 3 * DIM * EXPERT_DIM
    assert FORMS["swiglu"].row_flops == 6 * DIM * EXPERT_DIM
    assert FORMS["biased"].numbers == 2 * DIM * EXPERT_DIM + EXPERT_DIM + DIM
    assert FORMS["biased"].row_flops == 4 * DIM * EXPERT_DIM


def test_ternary_values_are_computed_with_and_their_gradient_goes_straight_through() -> None:
    inputs = Inputs(FORMS["ternary"], CHOICES["all used"])
    up_eFD, _ = inputs.bank.values()
    assert all(len(matrix.unique()) <= 3 for matrix in up_eFD) and not up_eFD.equal(inputs.bank.up)
    up_eFD.sum().backward()
    assert (inputs.bank.up.grad == 1).all()
    with pytest.raises(AssertionError, match="quantized"):
        ExpertBank(experts=(0,), form=FORMS["ternary"], cut=(0, 2))
