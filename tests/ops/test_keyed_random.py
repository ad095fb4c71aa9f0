"""Keyed random numbers: what they are keyed by, how they are distributed, and what does not change them."""

import hashlib
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.ops.keyed_random import (
    bits,
    coarse_uniform,
    gumbel,
    integers,
    normal,
    permutation,
    root,
    uniform,
)
from moetrain.routers.base import RouterContext

T, N = 4096, 16
MASK = (1 << 64) - 1


def key(count: int = T, length: int = 64, **fields: Any) -> RouterContext:
    """Sequences of 64 tokens of neighboring samples."""
    numbers_T = torch.arange(count)
    given = {"step": 7, "seed": 3, "router": "layers.1.moe", "sample_ids_T": numbers_T // length,
             "positions_T": numbers_T % length}
    return RouterContext(**given | fields)


def mixed_by_hand(x: int) -> int:
    """The finalizer of SplitMix64 in Python's own integers."""
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def bits_by_hand(context: RouterContext, token: int, index: int, use: str) -> int:
    gamma = 0x9E3779B97F4A7C15
    text = repr((context.seed, context.step, context.router, context.draw, use)).encode()
    hashed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    for word in (context.sample_ids_T, context.positions_T):
        hashed = mixed_by_hand(mixed_by_hand((int(word[token]) + gamma) & MASK) ^ hashed)
    return mixed_by_hand(hashed ^ mixed_by_hand((index + 1) * gamma & MASK))


@pytest.mark.parametrize("fields, use", [
    ({}, ""), ({"draw": 1, "step": 0}, "jitter"), ({"seed": 2**62}, "é")])
def test_the_hash_is_that_of_whole_numbers_of_any_size(fields: dict[str, Any], use: str) -> None:
    """int64 wraps around, as the 64 bits of the definition do."""
    context = key(130, **fields)
    context = context._replace(sample_ids_T=context.sample_ids_T + ((1 << 57) + 1))
    drawn = bits(context, 3, use=use)
    for token in (0, 1, 63, 64, 129):
        assert [number & MASK for number in drawn[token].tolist()] == [
            bits_by_hand(context, token, index, use) for index in range(3)]


def test_coarse_numbers_are_quarters_of_the_bits() -> None:
    context = key(64)
    drawn_TN, words_TN = coarse_uniform(context, 7, dtype=torch.float64), bits(context, 2)
    for token in (0, 63):
        quarters = [(words_TN[token, i // 4].item() >> 16 * (i % 4)) % 65536 for i in range(7)]
        assert drawn_TN[token].tolist() == [(quarter + 0.5) / 65536 for quarter in quarters]
    mean = coarse_uniform(key(), N).mean().item()
    assert abs(mean - 0.5) < 3 / (12 * T * N) ** 0.5


def test_the_numbers_of_a_key_never_change() -> None:
    context = key(2, length=1)
    assert root(context) == GOLDEN_ROOT and root(context, "noise") != GOLDEN_ROOT
    for name, draw in DRAWS.items():
        torch.testing.assert_close(draw(context).tolist(), GOLDEN[name], rtol=1e-15, atol=0, msg=name)


DRAWS = {"bits": lambda c: bits(c, 2), "uniform": lambda c: uniform(c, 2, dtype=torch.float64),
         "normal": lambda c: normal(c, 2, dtype=torch.float64),
         "gumbel": lambda c: gumbel(c, 2, dtype=torch.float64), "integers": lambda c: integers(c, 4, 10),
         "permutation": lambda c: permutation(c, 4)}
GOLDEN_ROOT = -5992512814374980689
GOLDEN = {
    "bits": [[-965810834228980523, 6389735249308534784], [-5353472391831544655, 1631531155769946883]],
    "uniform": [[0.9476432897659451, 0.346388241945376], [0.7097876801217534, 0.08844548117817819]],
    "normal": [[1.6224201365296822, -0.3950899793457945], [0.5527645590530162, -1.350389857930484]],
    "gumbel": [[2.9229071038157954, -0.05845289727774231], [1.0706390269528168, -0.8859836566018475]],
    "integers": [[9, 3, 4, 6], [7, 0, 0, 5]],
    "permutation": [[3, 0, 1, 2], [3, 0, 2, 1]],
}


@pytest.mark.parametrize("change", [
    {"seed": 4}, {"step": 8}, {"draw": 1}, {"router": "layers.11.moe"}, {"router": "layers.1.mo"}])
def test_every_part_of_the_key_changes_every_number(change: dict[str, Any]) -> None:
    same = uniform(key(), N) == uniform(key(**change), N)
    assert same.float().mean() < 1e-4                    # by chance 2^-23
    assert not torch.equal(uniform(key(), N), uniform(key(), N, use="jitter"))


def test_sample_and_position_are_not_exchanged_and_have_no_borders() -> None:
    columns = torch.arange(64)
    here = uniform(key(64, sample_ids_T=columns, positions_T=columns.flip(0)), N)
    there = uniform(key(64, sample_ids_T=columns.flip(0), positions_T=columns), N)
    assert (here == there).float().mean() < 1e-2
    assert bits(key(8192, length=1), 8).unique().numel() == 8192 * 8
    assert bits(key(8192, length=8192), 8).unique().numel() == 8192 * 8


def test_names_of_routers_do_not_collide() -> None:
    parts = ("moe", "attention", "moe.1", "m.oe")
    names = [f"layers.{layer}.{part}" for layer in range(500) for part in parts]
    assert len({root(key(1, router=name), use) for name in names for use in ("", "jitter")}) == 2 * len(names)


def chi_squared(counts: Tensor) -> float:
    """Pearson's statistic against equal probabilities, in standard deviations from its mean."""
    cells, mean = counts.numel(), counts.sum() / counts.numel()
    statistic = ((counts - mean).square() / mean).sum().item()
    return (statistic - (cells - 1)) / (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_numbers_fill_the_open_interval_evenly(dtype: torch.dtype) -> None:
    drawn = uniform(key(), 64, dtype=dtype).flatten()
    assert drawn.dtype == dtype and 0 < drawn.min() and drawn.max() < 1
    for cells in (7, 256, 1000):
        assert abs(chi_squared((drawn.double() * cells).long().bincount(minlength=cells).double())) < 4


def test_every_bit_is_a_fair_coin_and_neighbors_know_nothing_of_each_other() -> None:
    """Neighbors differ by one in a part of the key: number, position, sample, step, seed, draw."""
    def drawn(**fields: Any) -> Tensor:
        return bits(key(1024, **fields), 32)

    def bias(x: Tensor) -> float:
        """Largest distance of a bit from a fair coin, in standard deviations."""
        ones = ((x.flatten()[:, None] >> torch.arange(64)) & 1).sum(0)
        return ((ones - x.numel() / 2).abs().max() / (x.numel() / 4) ** 0.5).item()

    x = drawn()
    assert bias(x) < 5
    neighbors = {"number": (x[:, 1:], x[:, :-1]), "position": (x[1:], x[:-1]), "sample": (x[64:], x[:-64]),
                 "step": (x, drawn(step=8)), "seed": (x, drawn(seed=4)), "draw": (x, drawn(draw=1))}
    for name, (ours, its) in neighbors.items():
        assert bias(ours ^ its) < 5, name
        pair = (ours >> 60 & 15) * 16 + (its >> 60 & 15)
        assert abs(chi_squared(pair.flatten().bincount(minlength=256).double())) < 4, name


def test_normal_numbers_are_the_quantiles_of_the_uniform_ones() -> None:
    truth = torch.tensor([NormalDist().inv_cdf(u) for u in uniform(key(), 4, dtype=torch.float64).flatten()],
                         dtype=torch.float64)
    ours = normal(key(), 4, dtype=torch.float64).flatten()
    assert ((ours - truth).abs() <= 1e-15 * truth.abs().clamp(min=1)).all()
    single = normal(key(), 4).flatten()
    ulp = torch.nextafter(truth.float().abs(), torch.tensor(torch.inf)) - truth.float().abs()
    assert ((single.double() - truth).abs() <= ulp).all()


def test_normal_and_gumbel_numbers_have_their_moments() -> None:
    drawn, extreme = normal(key(), 64).double(), gumbel(key(), 64).double()
    moments = [(drawn.mean(), 0), (drawn.var(), 1), (drawn.pow(3).mean(), 0), (drawn.pow(4).mean(), 3),
               (extreme.mean(), 0.5772157), (extreme.var(), torch.pi ** 2 / 6)]
    for ours, truth in moments:
        assert ours.item() == pytest.approx(truth, abs=0.05)


def test_the_largest_of_logits_and_gumbel_numbers_is_a_draw_from_the_softmax() -> None:
    logits_E = torch.tensor([0.0, 1.0, -1.0, 0.5])
    chosen = (logits_E + gumbel(key(65536), 4)).argmax(-1).bincount(minlength=4) / 65536
    torch.testing.assert_close(chosen, logits_E.softmax(-1), atol=0.01, rtol=0)


@pytest.mark.parametrize("below", [1, 2, 3, 10, 1 << 31])
def test_integers_are_below_their_bound_and_equally_frequent(below: int) -> None:
    drawn = integers(key(), 64, below).flatten()
    assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() < below
    if below in (3, 10):
        assert abs(chi_squared(drawn.bincount(minlength=below).double())) < 4
    if below > 10:
        assert drawn.max() > 0.999 * below


def test_permutations_are_orders_of_equal_frequency() -> None:
    drawn = permutation(key(), 4)
    assert drawn.sort(-1).values.equal(torch.arange(4).expand(T, 4))
    assert abs(chi_squared((drawn * torch.tensor([64, 16, 4, 1])).sum(-1).unique(return_counts=True)[1]
                           .double())) < 4


@pytest.mark.parametrize("draw", [uniform, normal, gumbel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_knows_nothing_of_the_tokens_beside_it_and_of_how_many_are_drawn(draw, dtype) -> None:
    """Each token alone, any few together and any width: the same bits, whatever vector instructions do."""
    whole = draw(key(37, length=9), 11, dtype=dtype)
    for size in (1, 2, 5, 16):
        for first in range(0, 37, size):
            part = slice(first, first + size)
            some = key(37, length=9)
            some = some._replace(sample_ids_T=some.sample_ids_T[part], positions_T=some.positions_T[part])
            assert draw(some, 11, dtype=dtype).equal(whole[part])
    assert draw(key(37, length=9), 3, dtype=dtype).equal(whole[:, :3])


def test_precisions_agree_to_that_of_the_coarser() -> None:
    """A router in float64 sees the noise of the one in float32."""
    assert (uniform(key(), N).double() - uniform(key(), N, dtype=torch.float64)).abs().max() <= 2.0**-24
    for draw in (normal, gumbel):
        assert draw(key(), N).equal(draw(key(), N, dtype=torch.float64).float())


def test_a_context_without_samples_has_no_key() -> None:
    with pytest.raises(AssertionError, match="keyed by sample and position"):
        uniform(RouterContext(), 2)
    assert uniform(key(0), 3).shape == (0, 3)
