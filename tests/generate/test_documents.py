"""Generation uses the probabilities of training, where a window holds several documents."""

import pytest
import torch
from torch import Tensor

from moetrain.generate.sample import IncrementalModel, text_key
from moetrain.model.transformer import Transformer
from moetrain.routers.base import RouterContext
from tests.support.training import make_run

CONTEXT, MARK = 16, 47
KEY = text_key(0, 1, 0)
CAPACITY = ["capacity=position", "capacity.scope=sequence", "capacity.eval_factor=0.5",
            "capacity.min_capacity=1"]


def model_of(overrides: list[str]) -> Transformer:
    return make_run(["data.mask_documents=true", "run.dtype=float64", *overrides]).state.model.eval()


def ids(tokens: int, seed: int) -> list[int]:
    return torch.randint(MARK, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def trained(model: Transformer, window: list[int], documents: list[int]) -> Tensor:
    """Logits [S, V] of a training window; a token belongs to the document of the input."""
    return model(torch.tensor([window]), RouterContext(training=False),
                 torch.tensor([documents])).logits_BSV[0]


def worst(ours: list[Tensor], truth: Tensor) -> float:
    return max((mine - its).abs().max().item() for mine, its in zip(ours, truth, strict=True))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("prompt", [0, 1, 5])
def test_every_token_has_the_logits_that_it_has_in_training(cache, prompt):
    """The window begins with the end of another document, and that token alone with no document before it."""
    model, before, text = model_of([]), ids(5, 0), ids(9, 1)
    reader = IncrementalModel(model, CONTEXT, key=KEY, cache=cache, separate_first=True)
    ours = [reader.logits(torch.tensor([MARK, *text[:end]])) for end in range(prompt, len(text) + 1)]
    window = trained(model, [*before, MARK, *text], [0] * 6 + [1] * 9)[len(before):]
    alone = trained(model, [MARK, *text], [0] + [1] * 9)
    assert worst(ours, torch.cat([alone[:1], window[1:]])[prompt:]) < 1e-10
    # Here the text attends to the end of the other document.
    assert (alone[1:] - trained(model, [MARK, *text], [0] * 10)[1:]).abs().max() > 1e-3


@pytest.mark.parametrize("cache", [True, False])
def test_windows_that_slide_hold_the_text_alone(cache):
    model, text = model_of([]), ids(CONTEXT + 4, 2)
    reader = IncrementalModel(model, CONTEXT, key=KEY, cache=cache, separate_first=True)
    for end in range(1, len(text) + 1):
        seen = text[max(end - CONTEXT, 0):end]
        assert worst([reader.logits(torch.tensor([MARK, *text[:end]]))],
                     trained(model, seen, [0] * len(seen))[-1:]) < 1e-10


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_the_mark_takes_its_place_among_the_tokens_that_a_capacity_counts(cache, apart):
    model, text = model_of(CAPACITY), ids(9, 3)
    reader = IncrementalModel(model, CONTEXT, key=KEY, cache=cache, separate_first=apart)
    for end in range(len(text) + 1):
        window = trained(model, [MARK, *text[:end]], [0] + [int(apart)] * end)
        assert worst([reader.logits(torch.tensor([MARK, *text[:end]]))], window[-1:]) < 1e-10
