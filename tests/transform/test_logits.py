"""Logits of two models, and how far they are apart."""

import pytest
import torch

from moetrain.config.compose import for_run
from moetrain.routers.context import token_context
from moetrain.train.evaluation.trained import load_trained
from moetrain.transform import open_weights
from moetrain.transform.logits import compare_logits, model_logits


def test_they_are_those_of_evaluation() -> None:
    tokens_BS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    model = load_trained(for_run(["mine"])).model
    with torch.no_grad(), open_weights("mine") as source:
        context = token_context(tokens_BS, seed=0, step=0, training=False, sample_ids_B=torch.arange(1))
        assert torch.equal(model_logits(source)(tokens_BS), model(tokens_BS, context).logits_BSV)


@pytest.mark.parametrize("change, delta, exact", [
    (lambda logits: logits + 1e-5, 1e-5, True), (lambda logits: logits - 0.5, 0.5, False),
    (lambda logits: logits * float("nan"), None, False)])
def test_the_largest_difference_is_found_and_judged(change, delta, exact) -> None:
    def logits(tokens_BS):
        return torch.nn.functional.one_hot(tokens_BS, 12).double()       # as of a larger vocabulary

    found = compare_logits(logits, lambda tokens_BS: change(logits(tokens_BS))[..., :10], 10, 8)
    assert found.tokens == (2, 8) and found.max_abs_logit == 1 and found.is_exact == exact
    assert delta is None or found.max_abs_delta == pytest.approx(delta)
