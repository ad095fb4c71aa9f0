"""SwiGLU with the routing weight folded in, against its formula."""

import pytest
import torch

from moetrain.ops.swiglu import swiglu, swiglu_backward, swiglu_forward


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("hidden", [1, 7])
def test_value_and_every_gradient_follow_the_formula(rows, hidden):
    gate_up = torch.randn(rows, 2 * hidden, dtype=torch.float64, requires_grad=True)
    weights_R = torch.rand(rows, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(rows, hidden, dtype=torch.float64)
    out = swiglu(gate_up, weights_R)
    d_gate_up, d_weights = torch.autograd.grad(out, (gate_up, weights_R), grad)

    gate, up, w = gate_up.detach()[:, :hidden], gate_up.detach()[:, hidden:], weights_R.detach()[:, None]
    s = 1 / (1 + torch.exp(-gate))
    torch.testing.assert_close(out, gate * s * up * w)
    d_gate, d_up = grad * up * w * (s + gate * s * (1 - s)), grad * gate * s * w
    torch.testing.assert_close(d_gate_up, torch.cat([d_gate, d_up], 1))
    torch.testing.assert_close(d_weights, (grad * gate * s * up).sum(1))


def test_without_weights_any_leading_dims_do():
    gate_up = torch.randn(2, 3, 10)
    flat = swiglu(gate_up.flatten(0, 1), torch.ones(6))
    assert torch.equal(swiglu(gate_up).flatten(0, 1), flat)


def test_bfloat16_rows_and_float32_weights_stay_in_their_dtypes():
    gate_up = torch.randn(4, 6).bfloat16().requires_grad_()
    weights_R = torch.rand(4, requires_grad=True)
    out = swiglu(gate_up, weights_R)
    out.sum().backward()
    assert out.dtype == gate_up.grad.dtype == torch.bfloat16 and weights_R.grad.dtype == torch.float32


def test_a_float32_weight_is_not_rounded_before_it_is_applied():
    gate_up = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights_R = torch.rand(64, generator=torch.Generator().manual_seed(1))
    hidden = swiglu(gate_up)
    assert torch.equal(swiglu(gate_up, weights_R), (hidden.float() * weights_R[:, None]).bfloat16())
    # The input can tell the two apart.
    assert not torch.equal(swiglu(gate_up, weights_R), hidden * weights_R.bfloat16()[:, None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_without_autograd_it_is_the_same(dtype):
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(6, 10, generator=generator).to(dtype).requires_grad_()
    weights_R = torch.rand(6, generator=generator,
                           dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weights_R.requires_grad_()
    grad = torch.randn(6, 5, generator=generator).to(dtype)
    out = swiglu(gate_up, weights_R)
    truth = torch.autograd.grad(out, (gate_up, weights_R), grad)
    with torch.no_grad():
        assert swiglu_forward(gate_up, weights_R).equal(out)
        ours = swiglu_backward(grad.clone(), gate_up, weights_R)
    assert ours.hidden_RF.dtype == dtype
    for gradient, its in zip((ours.gate_up_RG, ours.weights_R, ours.hidden_RF), (*truth, out)):
        torch.testing.assert_close(gradient, its)
