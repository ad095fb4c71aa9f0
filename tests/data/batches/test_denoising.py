"""Corrupted windows: the text comes back whole, by another program; every mesh sees the same."""

import numpy as np
import pytest

from moetrain.config.denoisers import MODES, denoiser_of, longest, noise_and_spans
from moetrain.data.batches.denoising import DenoisedDataset, spans_of
from moetrain.data.batches.permutation import philox
from moetrain.data.batches.synthetic import SyntheticDataset
from tests.support.training import make_run, train_steps, union

V = 48
UL2 = ("r3_15", "r8_15", "s_25", "x3_50", "x8_50", "x64_15", "x64_50")


def dataset(names: tuple[str, ...] = UL2, *, seq_len: int = 64, min_length: float = 1.0,
            seed: int = 0) -> tuple[SyntheticDataset, DenoisedDataset]:
    plain = SyntheticDataset(vocab_size=V, num_domains=2, seq_len=seq_len, global_batch=32, seed=0,
                             min_length=min_length)
    return plain, DenoisedDataset(plain, rates=dict.fromkeys(names, 1.0), seq_len=seq_len, seed=seed)


def restored(inputs: list[int], targets: list[int]) -> tuple[str, list[int], int]:
    """Mode, text and number of corrupted tokens of a row: spans take the place of their sentinels."""
    sequence = [*inputs, targets[-1]]
    scored = next(place for place, target in enumerate(targets) if target >= 0) + 1
    assert targets[scored - 1:] == sequence[scored:] and set(targets[:scored - 1]) <= {-1}
    mode, given, wanted = sequence[0] - V, sequence[1:scored], sequence[scored:]
    assert 0 <= mode < 3
    if max(given + wanted, default=0) < V:                   # no sentinels: the end of the text
        return MODES[mode], given + wanted, len(wanted)
    spans: dict[int, list[int]] = {}
    for token in wanted:
        if token >= V + 3:
            assert token == V + 3 + len(spans)               # they come in order
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    assert spans.pop(max(spans)) == [] and all(spans.values())       # the last one closes, no span is empty
    assert [token for token in given if token >= V] == list(spans)
    return (MODES[mode], [part for token in given for part in spans.get(token, [token])],
            sum(map(len, spans.values())))


@pytest.mark.parametrize("min_length", [1.0, 0.02])
def test_every_text_comes_back_whole(min_length: float) -> None:
    plain, denoised = dataset(min_length=min_length)
    ids = np.arange(200)
    whole, batch = plain.batch(ids), denoised.batch(ids)
    assert batch.tokens_BS.shape == whole.tokens_BS.shape and batch.tokens_BS.max() < denoised.vocab_size
    assert (batch.targets_BS >= 0)[batch.valid_BS].any() and not batch.scored_BS[~batch.valid_BS].any()
    for row in range(len(ids)):
        many, length = int(batch.valid_BS[row].sum()), int(whole.valid_BS[row].sum())
        mode, text, noise = restored(batch.tokens_BS[row, :many].tolist(),
                                     batch.targets_BS[row, :many].tolist())
        assert text == whole.targets_BS[row, :len(text)].tolist() and noise
        sizes = {min(length, longest(denoiser, 65)): denoiser for denoiser in map(denoiser_of, UL2)
                 if denoiser.mode == mode}
        assert len(text) in sizes
        if mode != "s" and len(text) > 1:
            assert noise in [noise_and_spans(denoiser_of(name), len(text))[0] for name in UL2
                             if name[0] == mode]


@pytest.mark.parametrize("name", UL2)
def test_shares_are_those_that_are_named(name: str) -> None:
    _, denoised = dataset((name,), seq_len=256)
    batch = denoised.batch(np.arange(150))
    shares = []
    for row in range(150):
        many = int(batch.valid_BS[row].sum())
        mode, text, noise = restored(batch.tokens_BS[row, :many].tolist(),
                                     batch.targets_BS[row, :many].tolist())
        assert mode == name[0] and many >= 250               # little room is left
        shares.append(noise / len(text))
    wanted = denoiser_of(name).percent / 100
    assert np.mean(shares) == pytest.approx(wanted, abs=0.004 if name[0] != "s" else 0.03)
    assert np.std(shares) > 0.1 if name[0] == "s" else np.std(shares) < 1e-9


def test_spans_are_t5s() -> None:
    """Every division into so many parts is as likely: of 6 tokens with 2 spans of 3 there are 2 x 2 masks."""
    denoiser = denoiser_of("x2_50")
    assert noise_and_spans(denoiser, 6) == (3, 2)
    found: dict[str, int] = {}
    for sample in range(4000):
        mask = ["."] * 6
        for begin, end in spans_of(denoiser, 6, philox("spans", sample).random_raw(4)):
            mask[begin:end] = "#" * (end - begin)
        found["".join(mask)] = found.get("".join(mask), 0) + 1
    assert set(found) == {".#..##", ".##..#", "..#.##", "..##.#"} and min(found.values()) > 900


def test_a_window_is_corrupted_alike_wherever_it_is_read_and_otherwise_by_another_seed() -> None:
    _, denoised = dataset()
    together = denoised.batch(np.arange(12))
    for row in range(12):
        alone = denoised.batch(np.array([row]))
        assert all((ours == theirs[row]).all() for ours, theirs in zip(alone, together) if ours is not None)
    assert (dataset(seed=1)[1].batch(np.arange(12)).tokens_BS != together.tokens_BS).any()


def test_held_out_windows_stay_as_they_are() -> None:
    plain, denoised = dataset()
    ids = denoised.heldout_ids(1, 5)
    assert all((ours == theirs).all() for ours, theirs in zip(plain.batch(ids), denoised.batch(ids))
               if ours is not None)


def test_mixing_follows_the_rates() -> None:
    plain, _ = dataset()
    denoised = DenoisedDataset(plain, rates={"s_50": 3, "r3_15": 1}, seq_len=64, seed=0)
    first = denoised.batch(np.arange(2000)).tokens_BS[:, 0] - V
    assert set(first.tolist()) == {0, 1} and (first == 1).double().mean() == pytest.approx(0.75, abs=0.03)


DENOISED = ["denoising=ul2", "train.seq_len=24", "run.dtype=float64", "data.min_length=0.4"]


@pytest.mark.ranks
def test_two_ranks_train_as_one_process(ranks) -> None:
    one = union([train_steps([*DENOISED, "train.micro_batch=4"], 3)])
    two = union(ranks(2).run(train_steps, [*DENOISED, "parallel=ep", "run.nproc=2", "train.micro_batch=8"],
                             3))
    for name, parameter in one.parameters.items():
        assert (parameter - two.parameters[name]).abs().max() < 1e-10, name
    assert [m["tokens"] for m in one.metrics] == [m["tokens"] for m in two.metrics]
    assert one.metrics[-1]["loss/ce"] == pytest.approx(two.metrics[-1]["loss/ce"], rel=1e-10)


def test_the_vocabulary_has_a_row_for_every_id() -> None:
    run = make_run(DENOISED)
    assert run.state.model.embed.shape[0] == run.dataset.vocab_size > V + 3
