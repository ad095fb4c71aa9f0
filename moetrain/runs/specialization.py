"""Which experts serve which domain, from the choices of an evaluation: specialisation.npz, and one number.

Shapes: M domains, E experts of a router.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moetrain.runs.files import replacing, written


def mutual_information(choices_ME: np.ndarray) -> float:
    """Nats that a choice says about the domain of its token, every domain weighing the same: between 0, all domains use the
    experts alike, and log M, no expert serves two."""
    used = choices_ME.sum(1) > 0
    if not used.any():
        return 0.0
    shares_ME = choices_ME[used] / choices_ME[used].sum(1, keepdims=True)
    mean_E = shares_ME.mean(0)
    ratios_ME = np.divide(shares_ME, mean_E, out=np.ones_like(shares_ME), where=shares_ME > 0)
    return float((shares_ME * np.log(ratios_ME)).sum(1).mean())


def write_specialisation(path: Path, step: int, choices: Sequence[np.ndarray], routers: Mapping[str, int],
                         domains: Sequence[str]) -> None:
    """choices: int64 [M, E] by router. Entries beyond a router's experts are 0."""
    widest = max(routers.values())
    padded = np.stack([np.pad(part, ((0, 0), (0, widest - part.shape[1]))) for part in choices], axis=1)
    with written(path), replacing(path) as file:
        np.savez(file, choices=padded, domains=np.array(domains, dtype=np.str_), routers=np.array(list(routers), dtype=np.str_),
                 experts=np.array(list(routers.values()), dtype=np.int64), step=np.int64(step))
