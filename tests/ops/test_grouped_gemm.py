"""One matrix product per expert, on every path it can take, against a dense product with masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.grouped_gemm import grouped_outer, grouped_product, make_groups

SPLITS = [[2, 0, 3], [5, 0, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [4], []]
WIDTHS = [(16, 8), (7, 5)]                             # 16-byte strides, and widths that have none
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def one_hot(counts_e: list[int]) -> Tensor:
    """Float64 [R, e]: which expert a row belongs to."""
    expert_R = torch.repeat_interleave(torch.arange(len(counts_e)), torch.tensor(counts_e, dtype=torch.int64))
    return F.one_hot(expert_R, max(1, len(counts_e)))[:, :len(counts_e)].double()


def rows(counts_e: list[int], width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(sum(counts_e), width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(ours: Tensor, truth: Tensor) -> None:
    assert ours.shape == truth.shape
    scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=TOLERANCE[ours.dtype] * scale)


@pytest.mark.parametrize("counts_e", SPLITS, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_products_are_those_of_a_masked_dense_product(dtype, widths, counts_e):
    inner, outer = widths
    x_RI = rows(counts_e, inner, dtype, 0)
    matrix_eIO = torch.randn(len(counts_e), inner, outer,
                             generator=torch.Generator().manual_seed(1)).to(dtype)
    groups = make_groups(counts_e, x_RI.device)
    truth = torch.einsum("ri,eio,re->ro", x_RI.double(), matrix_eIO.double(), one_hot(counts_e))
    assert_near(grouped_product(x_RI, matrix_eIO, groups), truth)
    assert_near(grouped_product(x_RI, matrix_eIO.mT.contiguous().mT, groups), truth)       # a transposed view


@pytest.mark.parametrize("counts_e", SPLITS, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_outer_products_are_those_of_a_masked_dense_product(dtype, widths, counts_e):
    a_RI, b_RO = rows(counts_e, widths[0], dtype, 0), rows(counts_e, widths[1], dtype, 1)
    truth = torch.einsum("ri,ro,re->eio", a_RI.double(), b_RO.double(), one_hot(counts_e))
    out_eIO = grouped_outer(a_RI, b_RO, make_groups(counts_e, a_RI.device))
    assert_near(out_eIO, truth)
    for count, out_IO in zip(counts_e, out_eIO):
        assert bool(out_IO.any()) == (count > 0)
