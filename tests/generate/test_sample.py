"""Sampling: top-p, temperature 0, and one text for one seed, on several ranks, too."""

import pytest
import torch

from moetrain.data.tokenizers.tokenizer import ByteTokenizer
from moetrain.generate.sample import continue_text, draw, nucleus
from tests.support.training import make_run

BYTES = ["data.vocab_size=257", "model.init_std=0.3"]


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
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = lambda temperature, seed: [  # noqa: E731
        draw(logits, temperature, 0.9, generator) for generator in [torch.Generator().manual_seed(seed)]
        for _ in range(20)]
    # logits / 1e-310 is not a number.
    assert set(drawn(0, 1)) == set(drawn(1e-310, 1)) == {int(logits.argmax())}
    assert drawn(1.0, 3) == drawn(1.0, 3) and len(set(drawn(1.0, 3))) > 1


def text(overrides: list[str], **wish) -> str:
    run = make_run([*BYTES, *overrides])
    wish = {"tokens": 20, "temperature": 1.0, "top_p": 0.95, "seed": 0, "run_seed": 0, "step": 1,
            "context": 12, "cache": True, "mask_documents": False, **wish}
    return "".join(
        continue_text(run.state.model, ByteTokenizer(), "ab", end_id=256, group=run.mesh["batch"], **wish))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_text_is_the_same_with_and_without_the_cache(temperature):
    """20 tokens in a window of 12 make it slide."""
    first, second = (text([], temperature=temperature, cache=cache) for cache in (True, False))
    assert first == second and len(first) > 12


def test_a_prompt_longer_than_the_window_is_continued_by_its_end():
    assert text([], context=2, temperature=0) == text([], context=2, temperature=0, cache=False)


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["ep", "ddp"])
def test_ranks_write_one_text_together(ranks, mode):
    overrides = [f"parallel={mode}", "run.nproc=2", "train.micro_batch=8"]
    alone = text([])
    assert ranks(2).run(text, overrides) == [alone, alone]


def test_padding_of_the_vocabulary_is_never_drawn():
    """Rows beyond the tokenizer's ids have no meaning, however probable the model finds them."""
    run = make_run([*BYTES, "model.vocab_size=320"])
    assert run.state.model.embed.shape[0] == 320 and run.dataset.vocab_size == 257
    padding = torch.arange(320) >= 257
    run.state.model.head.data[padding] = 5 * run.state.model.head.data[65].clone()
    drawn = "".join(continue_text(
        run.state.model, ByteTokenizer(), "ab", end_id=256, tokens=20, temperature=1.0, top_p=1.0, seed=0,
        context=12, cache=True, mask_documents=False, run_seed=0, step=0, group=run.mesh["batch"]))
    assert drawn
