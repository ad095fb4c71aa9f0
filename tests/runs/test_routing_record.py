"""Measures of routing: known cases, and the equations by hand; and the folder of records."""

from pathlib import Path

import numpy as np
import pytest

from moetrain.runs.routing_record import (
    RoutingLog,
    churn,
    collapsed,
    collapsed_routers,
    flips,
    information,
    largest_share,
    purity,
    step_of,
    summary,
)
from tests.support.routing_records import random_record


def test_an_id_that_decides_tells_everything_and_one_that_does_not_tells_nothing() -> None:
    decides = information(np.array([[1000, 0], [0, 1000]]))
    assert decides.share == pytest.approx(1, abs=1e-3) and decides.entropy == pytest.approx(np.log(2))
    assert information(np.array([[10, 30], [20, 60]])).plain == pytest.approx(0, abs=1e-12)
    assert information(np.zeros((2, 3))) == (0, 0, 0) and information(np.array([[4, 0], [6, 0]])).share == 0


def test_it_is_the_mutual_information_of_id_and_expert() -> None:
    counts = np.array([[4, 1, 3], [0, 6, 2]])
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0)
    nats = sum(p * np.log(p / q) for p, q in zip(joint.ravel(), apart.ravel()) if p)
    found = information(counts)
    assert found.plain == pytest.approx(nats)
    assert found.nats == pytest.approx(max(0, nats + (2 + 3 - 5 - 1) / (2 * 16)))


def test_choices_at_random_among_few_tokens_tell_nothing_after_the_correction() -> None:
    draw = np.random.default_rng(0)
    counts = np.zeros((100, 8))
    np.add.at(counts, (draw.integers(0, 100, 2000), draw.integers(0, 8, 2000)), 1)
    found = information(counts)
    assert found.plain / found.entropy > 0.06 and found.share < 0.02


def test_purity_is_the_mean_over_ids_that_occur() -> None:
    assert purity(np.array([[3, 1], [0, 0], [2, 2]])) == (0.75 + 0.5) / 2


def test_churn_and_flips_are_counted_on_the_probe() -> None:
    one = random_record(1)
    first, active = one.first.copy(), np.unpackbits(one.active, axis=-1)
    first[0, :15] = (first[0, :15] + 1) % 4                  # a quarter of 60 tokens
    active[0, :15, :4] = np.arange(4) == first[0, :15, None]
    other = one._replace(step=np.int64(2), first=first, active=np.packbits(active, axis=-1))
    assert churn(one, one).tolist() == [0, 0] and flips(one, one).tolist() == [0, 0]
    assert churn(one, other).tolist() == [0.25, 0] and flips(one, other).tolist() == [0.5, 0]
    assert churn(one, other._replace(probe=np.array([3, 8]))) is None
    absent = np.where(np.arange(60) < 30, -1, first)
    # Tokens without a choice do not count.
    assert churn(one, other._replace(first=absent)).tolist() == [0, 0]


def test_a_router_has_collapsed_where_one_expert_takes_nearly_all_tokens() -> None:
    record = random_record()
    assert not collapsed(record, 0) and collapsed_routers(record) == {}
    forced = record.by_domain.copy()
    forced[0] = [[0, 30, 0, 0], [1, 29, 0, 0]]
    found = record._replace(by_domain=forced)
    assert largest_share(found, 0) == 59 / 60 and list(collapsed_routers(found)) == ["layers.0.moe"]
    every = forced.copy()
    every[0] = 30                                            # every token takes every expert
    assert not collapsed(record._replace(by_domain=every), 0)
    assert summary(found)["moe/routing/collapsed"] == 1


def test_records_of_later_steps_are_set_aside_on_resume(tmp_path: Path) -> None:
    log = RoutingLog(tmp_path / "routing")
    for step in (5, 10, 15):
        log.write(random_record(step))
    log.write(random_record(15), "abcdef0123456789")
    log.cut_to(10)
    assert [step_of(path) for path in log.paths()] == [5, 10]
    assert sorted(path.name for path in log.directory.glob("*.lost")) == [
        "step-00000015.abcdef012345.npz.lost", "step-00000015.npz.lost"]
    with np.load(log.paths()[0]) as found:
        assert all(np.array_equal(found[name], array) for name, array in random_record(5)._asdict().items())
