"""Sampling: what top-p keeps, what temperature 0 takes, and that a seed gives a text."""

import pytest
import torch

from moetrain.generate.sample import next_token, nucleus
from tests.integration.training import make_run


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
def test_the_nucleus_reaches_its_mass_and_no_smaller_set_does(top_p):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    full, kept = logits.softmax(-1), nucleus(logits, top_p)
    inside = kept > 0
    assert full[inside].sum() >= top_p - 1e-12
    assert full[inside].sum() - full[inside].min() < top_p
    assert full[inside].min() >= full[~inside].max() if (~inside).any() else top_p == 1.0
    assert torch.allclose(kept[inside], full[inside] / full[inside].sum()) and kept.sum() == pytest.approx(1)


def test_temperature_zero_takes_the_most_probable_and_a_seed_repeats():
    model = make_run([]).state.model.eval()
    tokens = torch.tensor([1, 5, 9])
    draw = lambda temperature, seed: [  # noqa: E731
        next_token(model, tokens, temperature, 0.9, generator) for generator in [torch.Generator().manual_seed(seed)]
        for _ in range(20)]
    assert len(set(draw(0, 1))) == 1
    assert draw(1.0, 3) == draw(1.0, 3) and len(set(draw(1.0, 3))) > 1
