"""Hash routing: a table of experts by token id, by universal hash functions or by frequency."""

import numpy as np
import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.model.initialization import materialize
from moetrain.routers.base import RouterContext
from moetrain.routers.hash import HashRouter, balanced_table, modulo_table

E, V = 8, 300


class Numbers:
    """Draws given numbers."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)

    def randrange(self, *_: int) -> int:
        return self.numbers.pop(0)

    def sample(self, population: range, count: int) -> list[int]:
        return [*population][:count]


def router_of(k: int = 1, **given) -> HashRouter:
    router = HashRouter(num_experts=E, top_k=k, vocab_size=V, **{"name": "layers.0.moe", **given})
    materialize(router, seed=3, std=1.0, num_layers=1)
    return router


def test_the_expert_of_an_id_is_the_formula():
    for token, expert in enumerate(modulo_table(V, E, 1, Numbers(123456789, 987654321))[:, 0]):
        assert expert == (123456789 * token + 987654321) % (2**31 - 1) % E


def test_further_experts_are_chosen_from_those_left():
    table_VK = modulo_table(V, E, 3, Numbers(11, 5, 7919, 3, 104729, 1))
    for token, chosen in enumerate(table_VK.tolist()):
        left, expected = list(range(E)), []
        for factor, shift in ((11, 5), (7919, 3), (104729, 1)):
            expected.append(left.pop((factor * token + shift) % (2**31 - 1) % len(left)))
        assert chosen == expected


def test_the_id_alone_decides_and_experts_have_equal_weights():
    router, ids_T = router_of(2, name="layers.1.moe"), torch.tensor([5, 299, 5])
    first, second = (router.route(x_TD, RouterContext(token_ids_T=ids_T))
                     for x_TD in (torch.zeros(3, 4), torch.randn(3, 4)))
    assert first.ids_TK.equal(second.ids_TK) and first.ids_TK[0].equal(first.ids_TK[2])
    assert first.ids_TK.equal(router.table[ids_T].long()) and first.weights_TK.unique().tolist() == [0.5]
    assert router_of().route(torch.zeros(3, 4), RouterContext(token_ids_T=ids_T)).weights_TK.eq(1).all()


def test_routers_and_seeds_hash_differently_and_run_seeds_alike():
    tables = [router_of(name=name, seed=seed).table for name, seed in (
        ("layers.0.moe", 0), ("layers.0.moe.1", 0), ("layers.0.moe", 1))]
    assert all((a == b).float().mean() < 0.5 for a, b in zip(tables, tables[1:]))
    other = HashRouter(num_experts=E, top_k=1, vocab_size=V, name="layers.0.moe")
    materialize(other, seed=4, std=1.0, num_layers=1)
    assert other.table.equal(tables[0])
    shares_E = torch.bincount(tables[0][:, 0].long(), minlength=E) / V
    assert (shares_E - 1 / E).abs().max() < 0.05


def test_frequent_ids_are_spread_first():
    """The greedy rule by hand: 0 -> expert 0, 3 -> 1, 1 -> 2, then 2 and 4 to the least loaded."""
    counts_V = np.array([50, 20, 5, 30, 25, 0])
    assert balanced_table(counts_V, 3, 1, Numbers())[:, 0].tolist() == [0, 2, 1, 1, 2, 1][:2] + [1, 1, 2, 1]


@pytest.mark.parametrize("k", [1, 3])
def test_a_balanced_table_has_even_loads(tmp_path, k):
    counts_V = (10_000 / np.arange(1, V + 1)).astype(np.int64)          # Zipf's law
    np.save(tmp_path / "counts.npy", counts_V)
    router = router_of(k, table="balanced", counts_path=str(tmp_path / "counts.npy"))
    loads_E = np.bincount(router.table.flatten().numpy(), weights=counts_V.repeat(k), minlength=E)
    assert loads_E.max() <= max(counts_V[0], 1.01 * loads_E.mean())
    assert all(len(set(row)) == k for row in router.table.tolist())
    alike = router_of(k, table="balanced")
    assert np.ptp(np.bincount(alike.table.flatten().numpy(), minlength=E)) <= 1


@pytest.mark.parametrize("content", [np.ones(V - 1, int), np.ones(V), -np.ones(V, int), None])
def test_counts_of_something_else_are_refused(tmp_path, content):
    path = tmp_path / "counts.npy"
    path.write_bytes(b"no array") if content is None else np.save(path, content)
    with pytest.raises(ConfigError, match="E-CONFIG-258"):
        router_of(table="balanced", counts_path=str(path))
