"""Records of log.routing with random choices."""

import numpy as np

from moetrain.runs.routing_record import DECILES, RoutingRecord


def random_record(step: int = 7, *, experts: tuple[int, ...] = (4, 3), tokens: int = 60, ids: int = 5,
                  seed: int = 0, drops: bool = True) -> RoutingRecord:
    """One choice a token, of which the first two decide by the token's id."""
    draw = np.random.default_rng([seed, step])
    routers, most = len(experts), max(experts)
    token_ids, domains = draw.integers(0, ids, tokens), draw.integers(0, 2, tokens)
    chosen = np.stack([draw.integers(0, each, tokens) for each in experts])
    tables = {"ids": (token_ids, ids), "previous": (np.roll(token_ids, 1), ids),
              "positions": (np.arange(tokens) % 6, 6), "by_domain": (domains, 2)}
    counts = {name: np.zeros((routers, rows, most), np.int64) for name, (_, rows) in tables.items()}
    for name, (keys, _) in tables.items():
        for router in range(routers):
            np.add.at(counts[name][router], (keys, chosen[router]), 1)
    pairs = np.zeros((routers, routers, most, most), np.int64)
    for one in range(routers):
        for other in range(one + 1, routers):
            np.add.at(pairs[one, other], (chosen[one], chosen[other]), 1)
    by_decile = np.full((2, routers, DECILES), tokens // DECILES)
    active = np.packbits(chosen[..., None] == np.arange(most), axis=-1)
    return RoutingRecord(
        step=np.int64(step), routers=np.array([f"layers.{i}.moe" for i in range(routers)]),
        experts=np.array(experts), inputs=np.array(["held_out", "shifted"]),
        domains=np.array(["code", "prose"]),
        tokens=np.array([tokens, tokens]), pairs=pairs, chosen=by_decile,
        dropped=by_decile * drops * np.arange(DECILES) // 20, unrouted=np.zeros((2, routers), np.int64),
        entropy=tokens * draw.random((2, routers)), spread=np.array([[1.0, 4.0]] * routers),
        probe=np.array([3, 9]), first=chosen, active=active, **counts)
