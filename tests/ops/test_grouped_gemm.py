"""One matrix product per expert, on every path it can take, against a dense product with masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.grouped_gemm import grouped_linear

SPLITS = [[2, 0, 3], [5, 0, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [4]]
WIDTHS = [(16, 8), (7, 5)]                             # 16-byte strides, and widths that have none
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def by_masks(x_RI: Tensor, weight_eOI: Tensor, counts_e: list[int]) -> Tensor:
    """Every row times every expert, then one of them is kept."""
    expert_R = torch.repeat_interleave(torch.arange(len(counts_e)), torch.tensor(counts_e))
    return torch.einsum("ri,eoi,re->ro", x_RI, weight_eOI, F.one_hot(expert_R, len(counts_e)).to(x_RI.dtype))


@pytest.mark.parametrize("counts_e", SPLITS, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_products_and_gradients_are_those_of_a_masked_dense_product(dtype, widths, counts_e):
    inner, outer = widths
    generator = torch.Generator().manual_seed(0)
    x_RI = torch.randn(sum(counts_e), inner, generator=generator).to(dtype).requires_grad_()
    weight_eOI = torch.randn(len(counts_e), outer, inner, generator=generator).to(dtype).requires_grad_()
    grad_RO = torch.randn(sum(counts_e), outer, generator=generator).to(dtype)
    out_RO = grouped_linear(x_RI, weight_eOI, counts_e)
    grads = torch.autograd.grad(out_RO, (x_RI, weight_eOI), grad_RO)

    exact = [tensor.detach().double().requires_grad_() for tensor in (x_RI, weight_eOI)]
    truth = by_masks(*exact, counts_e)
    true_grads = torch.autograd.grad(truth, exact, grad_RO.double())
    assert out_RO.dtype == dtype and out_RO.shape == truth.shape
    for ours, its in zip((out_RO, *grads), (truth, *true_grads)):
        scale = max(1.0, its.abs().max().item()) if its.numel() else 1.0
        torch.testing.assert_close(ours.double(), its, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_an_expert_without_rows_gets_zeros_and_not_none(dtype):
    for counts_e in ([2, 0, 3], [0, 0, 0]):
        x_RI = torch.randn(sum(counts_e), 16).to(dtype).requires_grad_()
        weight_eOI = torch.randn(3, 8, 16).to(dtype).requires_grad_()
        (grouped_linear(x_RI, weight_eOI, counts_e) * 1.5).sum().backward()
        assert x_RI.grad.shape == x_RI.shape
        for count, grad_OI in zip(counts_e, weight_eOI.grad):
            assert bool(grad_OI.any()) == (count > 0)
