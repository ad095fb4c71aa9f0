"""The consistency of two passes: the divergence, its gradients, and a run that the config puts on it."""

import numpy as np
import torch

from moetrain.losses.consistency import ConsistencyLoss, symmetric_divergence
from moetrain.train.step import train_step
from tests.support.training import make_run

SCORED = torch.tensor([True, True, False])


def logits(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 7, dtype=torch.float64, generator=generator).requires_grad_()


def test_it_is_the_authors_formula():
    """1/2 sum (p - q) (ln p - ln q), of what is no padding."""
    first, second = logits(0), logits(1)
    p, q = (np.exp(one.detach().numpy()) / np.exp(one.detach().numpy()).sum(1, keepdims=True)
            for one in (first, second))
    expected = 0.5 * ((p - q) * (np.log(p) - np.log(q))).sum(1) * SCORED.numpy()
    found = symmetric_divergence(first, second, SCORED)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-12)
    kl = (p * np.log(p / q)).sum(1) / 2 + (q * np.log(q / p)).sum(1) / 2
    np.testing.assert_allclose(found.detach(), kl * SCORED.numpy(), rtol=1e-12)


def test_it_is_zero_for_equal_passes_symmetric_and_never_negative():
    first, second = logits(0), logits(1)
    there, back = (symmetric_divergence(*pair, SCORED) for pair in ((first, second), (second, first)))
    torch.testing.assert_close(there, back, rtol=1e-14, atol=0)
    assert (there >= 0).all() and not symmetric_divergence(first, first + 5, SCORED).abs().gt(1e-14).any()


def test_both_passes_have_gradients():
    first, second = logits(0), logits(1)
    grads = torch.autograd.grad(symmetric_divergence(first, second, SCORED).sum(), (first, second))
    assert all(grad[:2].any() and not grad[2].any() for grad in grads)


def test_the_config_puts_a_run_on_it():
    run = make_run(["router=stochastic", "model.top_k=1", "language_loss=consistency",
                    "language_loss.weight=2"])
    assert isinstance(run.objective.language, ConsistencyLoss) and run.objective.language.weight == 2
    result = train_step(run, 1)
    assert result.metrics["tokens"] == 16 * 12                           # a text counts once, in two passes
    assert all(counts.sum() == 2 * 16 * 12 for counts in result.counts.values())
