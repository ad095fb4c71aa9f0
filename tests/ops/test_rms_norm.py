"""RMSNorm as one op, against its formula in float64."""

import pytest
import torch
from torch import Tensor

from moetrain.ops.rms_norm import rms_norm

EPS = 1e-3


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def heads(dtype: torch.dtype) -> Tensor:
    """Heads of a projection as attention passes them: [B, H, S, h] with the strides of [B, S, H, h]."""
    return torch.randn(2, 5, 6, 4, dtype=dtype).transpose(1, 2)[:, 1:4].detach()


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 5), (1, 1), (0, 4), "heads"], ids=str)
def test_value_and_gradients_follow_the_formula(shape):
    x = heads(torch.float64) if shape == "heads" else torch.randn(shape, dtype=torch.float64)
    x.requires_grad_()
    weight = torch.randn(x.shape[-1], dtype=torch.float64, requires_grad=True)
    out, truth = rms_norm(x, weight, EPS), formula(x, weight)
    torch.testing.assert_close(out, truth)
    grad = torch.randn_like(out)
    for ours, exact in zip(torch.autograd.grad(out, (x, weight), grad),
                           torch.autograd.grad(truth, (x, weight), grad)):
        torch.testing.assert_close(ours, exact)


def test_gradients_pass_gradcheck():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight))


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    x = torch.randn(16, 8).bfloat16().requires_grad_()
    weight = torch.randn(8, requires_grad=True)
    out = rms_norm(x, weight, EPS)
    assert out.equal(rms_norm(x.float(), weight, EPS).bfloat16())
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_one_number_a_row_is_kept_besides_the_inputs():
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor,
                                                  lambda tensor: tensor):
        rms_norm(x, weight, EPS)
    given = {tensor.data_ptr() for tensor in (x, weight)}
    assert [tensor.shape for tensor in kept if tensor.data_ptr() not in given] == [(6,)]


def test_the_op_is_well_formed():
    for x in (torch.randn(3, 8, requires_grad=True), torch.randn(3, 8).bfloat16(), heads(torch.float32)):
        torch.library.opcheck(torch.ops.moetrain.rms_norm,
                              (x, torch.randn(x.shape[-1], requires_grad=True), EPS))
