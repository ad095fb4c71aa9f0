"""Norms against their formulas."""

import pytest
import torch

from moetrain.model.norms import LayerNorm, RMSNorm


def by_formula(norm: RMSNorm | LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """Computed in float64, without the rounding at the end."""
    wide, weight = x.double(), norm.weight.double()
    if isinstance(norm, LayerNorm):
        wide = wide - wide.mean(-1, keepdim=True)
    scaled = wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight
    return scaled + norm.bias.double() if isinstance(norm, LayerNorm) else scaled


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_bfloat16_norms_are_computed_in_float32(kind):
    norm = kind(dim=64, eps=1e-6)
    for name, parameter in norm.named_parameters():
        torch.nn.init.constant_(parameter, float(name == "weight"))
    x = torch.randn(3, 64).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), by_formula(norm, x).float().bfloat16(), rtol=2**-8, atol=0)
    assert kind is LayerNorm or torch.equal(norm(x), by_formula(norm, x).float().bfloat16())


def test_layer_norm_and_its_gradients_are_those_of_the_formula():
    norm = LayerNorm(dim=6, eps=1e-2).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    ours, truth, leaves = norm(x), by_formula(norm, x), (x, *norm.parameters())
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(ours)
    for mine, other in zip(*(torch.autograd.grad(out, leaves, grad) for out in (ours, truth))):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
