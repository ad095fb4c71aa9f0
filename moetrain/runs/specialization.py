"""Specialization of experts by domain, from the routing choices of an evaluation.

One number, the mutual information of expert and domain, and the file specialisation.npz, which report/ draws.

Shapes: M domains, E experts of a router.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moetrain.runs.files import as_disk_error, replace_atomically


def mutual_information(choices_ME: np.ndarray) -> float:
    """Mutual information, in nats, between the expert of a choice and the domain of its token.

    Every domain has the same weight. The value lies between 0, where all domains use the experts alike, and
    log M, where no expert serves two domains.
    """
    used = choices_ME.sum(1) > 0
    if not used.any():
        return 0.0
    shares_ME = choices_ME[used] / choices_ME[used].sum(1, keepdims=True)
    mean_E = shares_ME.mean(0)
    ratios_ME = np.divide(shares_ME, mean_E, out=np.ones_like(shares_ME), where=shares_ME > 0)
    return float((shares_ME * np.log(ratios_ME)).sum(1).mean())


def write_specialization(path: Path, step: int, choices: Sequence[np.ndarray], routers: Mapping[str, int],
                         domains: Sequence[str]) -> None:
    """Write specialisation.npz. Routers with fewer experts than others are padded with 0.

    Args:
        path: the file.
        step: step of the evaluation.
        choices: int64 [M, E] for each router, tokens of a domain that chose an expert.
        routers: number of experts E of each router, in the order of `choices`.
        domains: their names.
    """
    widest = max(routers.values())
    padded = np.stack([np.pad(part, ((0, 0), (0, widest - part.shape[1]))) for part in choices], axis=1)
    with as_disk_error(path), replace_atomically(path) as file:
        np.savez(file, choices=padded, domains=np.array(domains, dtype=np.str_),
                 routers=np.array(list(routers), dtype=np.str_),
                 experts=np.array(list(routers.values()), dtype=np.int64), step=np.int64(step))
