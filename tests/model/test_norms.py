"""Norms against their formulas."""

import torch

from moetrain.model.norms import RMSNorm


def test_bfloat16_norms_are_computed_in_float32():
    norm = RMSNorm(dim=64, eps=1e-6)
    torch.nn.init.ones_(norm.weight)
    x = torch.randn(3, 64).bfloat16()
    truth = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), truth.float().bfloat16())
