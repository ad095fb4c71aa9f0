"""Synthetic expert loads: a seeded family of cases that planners are compared on, beside recorded loads.

    balanced                  experts equally popular, tokens drawn at random
    lognormal_0.5, _1, _1.5   popularity log-normal with that sigma, drifting from step to step, different at
                              every source
    hot_expert                one expert takes a third of all rows
    hot_rank                  the experts of one position (in equal blocks) take half of all rows
    ragged                    log-normal with sigma 1; sources send between a tenth and nearly twice the mean
                              number of rows
    rotating                  as hot_expert, with another expert every few steps
    burst                     balanced, but in the last steps of every dozen a few experts take half
    empty                     log-normal with sigma 1; one expert gets no rows, and one source sends none

Numbers are drawn by numpy's PCG64 from (case, seed), so a case is the same on every machine.

Shapes: t steps, P positions (sources), E experts.
"""

import zlib

import numpy as np

NAMES = ("balanced", "lognormal_0.5", "lognormal_1", "lognormal_1.5", "hot_expert", "hot_rank", "ragged",
         "rotating", "burst", "empty")

MEMORY = 0.95                       # of log-popularity over a step (AR(1)): half is forgotten in 14 steps
SOURCE_SIGMA = 0.3                  # how much the popularity at one source differs from the common one
ROTATION_STEPS = 10                 # steps for which a rotating expert stays hot
BURST_PERIOD, BURST_STEPS = 12, 3   # a burst every so many steps, for so many


def generate(name: str, seed: int, steps: int, positions: int, experts: int, rows: int) -> np.ndarray:
    """Draw the rows that each source sends to each expert.

    Args:
        name: a case of `NAMES`.
        seed: other loads of the same case.
        steps: number of steps.
        positions: number of sources.
        experts: number of experts.
        rows: rows that a source sends in a step (tokens times top-k); for `ragged` their mean over sources.

    Returns:
        int64 [steps, positions, experts].
    """
    assert name in NAMES, (name, NAMES)
    rng = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))
    popularity_tE = _popularity(name, rng, steps, positions, experts)
    chances_tPE = _source_chances(popularity_tE, _source_sigma(name), rng, positions)
    rows_P = np.full(positions, rows)
    if name == "ragged":
        if positions > 1:
            rows_P = np.round(np.linspace(0.1, 1.9, positions) * rows).astype(np.int64)
        rows_P = rng.permutation(rows_P)
    if name == "empty":
        rows_P[rng.integers(positions)] = 0
    return rng.multinomial(rows_P[None, :], chances_tPE).astype(np.int64)


def _popularity(name: str, rng: np.random.Generator, steps: int, positions: int, experts: int) -> np.ndarray:
    """Popularity of the experts at every step, float64 [steps, experts]; every step sums to 1."""
    sigmas = {"lognormal_0.5": 0.5, "lognormal_1": 1.0, "lognormal_1.5": 1.5, "ragged": 1.0, "empty": 1.0}
    sigma = sigmas.get(name, 0.0)
    weights_tE = np.exp(sigma * _drift(rng, steps, experts)) if sigma else np.ones((steps, experts))
    if name == "empty":
        weights_tE[:, rng.integers(experts)] = 0.0
    first = int(rng.integers(experts))
    for step in range(steps):
        match name:
            case "hot_expert":
                _set_share(weights_tE[step], [first], 1 / 3)
            case "hot_rank":
                block = -(-experts // positions)
                start = first // block * block
                _set_share(weights_tE[step], range(start, min(start + block, experts)), 1 / 2)
            case "rotating":
                _set_share(weights_tE[step], [(first + step // ROTATION_STEPS * 7) % experts], 1 / 3)
            case "burst" if step % BURST_PERIOD >= BURST_PERIOD - BURST_STEPS:
                few = max(1, experts // 16)
                hot = [(first + step // BURST_PERIOD + i) % experts for i in range(few)]
                _set_share(weights_tE[step], hot, 1 / 2)
    return weights_tE / weights_tE.sum(1, keepdims=True)


def _drift(rng: np.random.Generator, steps: int, experts: int) -> np.ndarray:
    """Stationary AR(1) process of unit variance, float64 [steps, experts]."""
    noise_tE = rng.standard_normal((steps, experts))
    for step in range(1, steps):
        noise_tE[step] = MEMORY * noise_tE[step - 1] + np.sqrt(1 - MEMORY**2) * noise_tE[step]
    return noise_tE


def _set_share(weights_E: np.ndarray, chosen: list[int] | range, share: float) -> None:
    """Give the chosen experts that share of the sum together, equally; all of it where there are no others.

    In place.
    """
    others = weights_E.sum() - weights_E[list(chosen)].sum()
    weights_E[list(chosen)] = (others * share / (1 - share) if others else 1.0) / len(chosen)


def _source_sigma(name: str) -> float:
    return 0.0 if name in ("balanced", "burst", "hot_expert", "hot_rank", "rotating") else SOURCE_SIGMA


def _source_chances(popularity_tE: np.ndarray, sigma: float, rng: np.random.Generator,
                    positions: int) -> np.ndarray:
    """Chance of each expert at each source, float64 [steps, positions, experts].

    The common popularity times a factor of the source's own, which it keeps for all steps.
    """
    own_PE = np.exp(sigma * rng.standard_normal((positions, popularity_tE.shape[1])))
    chances_tPE = popularity_tE[:, None] * own_PE
    return chances_tPE / chances_tPE.sum(2, keepdims=True)
