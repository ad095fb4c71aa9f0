"""Record of an evaluation's routing (log.routing): what experts were chosen for, and its measures.

    RoutingRecord        the arrays of log/routing/step-NNNNNNNN.npz, which report/ draws
    RoutingLog           the folder log/routing
    information          nats that two things tell of each other, from a table of counts
    churn, flips         how choices changed between two evaluations
    summary              the numbers of eval.jsonl

Every array but `probe`, `first` and `active` is a sum over tokens. The measures are those of OpenMoE (Xue et
al. 2024, arXiv 2402.01739, section 4): specialization by token id rather than by context, choices that are
learned early, drops towards the end; of RMoE (information between layers); of ReMoE (flips); and collapse,
tokens without an expert, clusters of representations (Moirai-MoE), and entropy on shifted input.

Shapes: R routers, E experts of the largest router, V token ids, P stretches of a sequence, M domains, I
inputs, N tokens of the probe.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrain.runs.files import as_disk_error, replace_atomically

DECILES = 10
COLLAPSED = 0.9    # share of the tokens that one expert takes in a collapsed router


class RoutingRecord(NamedTuple):
    """Routing of one evaluation. Entries beyond a router's experts are 0."""

    step: np.ndarray           # int64 []
    routers: np.ndarray        # text [R]
    experts: np.ndarray        # int64 [R]
    inputs: np.ndarray         # text [I]: as it stands; shifted, its tokens in a random order
    domains: np.ndarray        # text [M]
    tokens: np.ndarray         # int64 [I]
    ids: np.ndarray            # int64 [R, V, E]: slots by the token's id
    previous: np.ndarray       # int64 [R, V, E]: by the id of the token before it
    positions: np.ndarray      # int64 [R, P, E]: by its place in the sequence, in P stretches of equal length
    by_domain: np.ndarray      # int64 [R, M, E]
    pairs: np.ndarray          # int64 [R, R, E, E]: first choices of a router and of a later one
    chosen: np.ndarray         # int64 [I, R, 10]: slots by decile of the sequence
    dropped: np.ndarray        # int64 [I, R, 10]: those of them that capacity dropped
    unrouted: np.ndarray       # int64 [I, R]: tokens without an expert, after drops
    entropy: np.ndarray        # float64 [I, R]: of the router's probabilities, nats
    spread: np.ndarray         # float64 [R, 2]: squared distances of the routers' inputs from their mean: the
                               # part between the means of first choices, and all
    probe: np.ndarray          # int64 [W]: sequences of the probe
    first: np.ndarray          # int64 [R, N]: their tokens' first choices, -1 where there is none
    active: np.ndarray         # uint8 [R, N, E / 8]: the experts of each token, as bits

    def experts_of(self, router: int) -> slice:
        """The entries of a router's experts."""
        return slice(0, int(self.experts[router]))


class RoutingLog:
    """The records of a run, one for each evaluation.

    Args:
        directory: <run.dir>/log/routing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, record: RoutingRecord, data: str | None = None) -> Path:
        """Write a record.

        Args:
            record: the record.
            data: fingerprint of the data, if it is not what the run held out.

        Returns:
            The path.
        """
        path = self.directory / (f"step-{int(record.step):08d}" + (f".{data[:12]}" if data else "") + ".npz")
        with as_disk_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_atomically(path) as file:
                np.savez_compressed(file, **record._asdict())
        return path

    def paths(self) -> list[Path]:
        """The records, by step."""
        return sorted(self.directory.glob("step-*.npz"))

    def cut_to(self, step: int) -> None:
        """Set aside the records of later steps, as *.lost."""
        for path in self.paths():
            if step_of(path) > step:
                with as_disk_error(path):
                    path.replace(path.with_name(path.name + ".lost"))


def step_of(path: Path) -> int:
    """Step of the evaluation whose record lies at this path; -1 for a file of another name."""
    digits = path.name.removeprefix("step-").partition(".")[0]
    return int(digits) if digits.isdecimal() else -1


class Information(NamedTuple):
    """What a thing tells of the expert.

    Attributes:
        nats: mutual information of the two, corrected.
        entropy: of the expert, nats.
        plain: mutual information of the shares as counted.
    """

    nats: float
    entropy: float
    plain: float

    @property
    def share(self) -> float:
        """Share of what there is to know of the expert."""
        return self.nats / self.entropy if self.entropy else 0.0


def information(counts_XE: np.ndarray) -> Information:
    """Measure what a thing X tells of the expert, from counts [X, E].

    The information of counted shares is too large by about (x - 1) (e - 1) / 2 n, as if few tokens of an id
    had chosen by it. It is corrected by Miller and Madow's estimate for each of the three entropies,
    H + (number of entries above 0 - 1) / 2n, and not below 0.
    """
    total = counts_XE.sum()
    if not total:
        return Information(0.0, 0.0, 0.0)
    parts = [counts_XE.sum(1), counts_XE.sum(0), counts_XE.ravel()]
    of_x, of_expert, of_both = (_entropy(part / total) for part in parts)
    seen_x, seen_e, seen = (int((part > 0).sum()) for part in parts)
    plain = max(0.0, of_x + of_expert - of_both)
    return Information(max(0.0, plain + (seen_x + seen_e - seen - 1) / (2 * total)), of_expert, plain)


def purity(counts_XE: np.ndarray) -> float:
    """Mean over X of the share of its most frequent expert."""
    of_X = counts_XE.sum(1)
    return float((counts_XE.max(1)[of_X > 0] / of_X[of_X > 0]).mean()) if of_X.any() else 0.0


def largest_share(record: RoutingRecord, router: int) -> float:
    """Share of the tokens that take the most used expert of a router."""
    return float(record.by_domain[router].sum(0).max()) / max(1, int(record.tokens[0]))


def collapsed(record: RoutingRecord, router: int) -> bool:
    """Whether one expert takes nearly all tokens, of a router that could take at least twice as many."""
    slots = float(record.by_domain[router].sum())
    few = slots <= int(record.tokens[0]) * int(record.experts[router]) / 2
    return few and largest_share(record, router) > COLLAPSED


def churn(before: RoutingRecord, after: RoutingRecord) -> np.ndarray | None:
    """Share of the probe's tokens whose first choice differs, [R]; None if the probes do."""
    if not _alike(before, after):
        return None
    both_RN = (before.first >= 0) & (after.first >= 0)
    differ_RN = (before.first != after.first) & both_RN
    return differ_RN.sum(1) / np.maximum(both_RN.sum(1), 1)


def flips(before: RoutingRecord, after: RoutingRecord) -> np.ndarray | None:
    """Experts that a token of the probe takes up or leaves, on average, [R]; None if the probes differ.

    Over the number of experts it is ReMoE's flip rate.
    """
    if not _alike(before, after) or before.active.shape != after.active.shape:
        return None
    changed = np.unpackbits(before.active ^ after.active, axis=-1).sum((1, 2))
    return changed / max(1, before.first.shape[1])


def summary(record: RoutingRecord) -> dict[str, float]:
    """The numbers of a record for eval.jsonl, means over routers."""
    routers = range(len(record.routers))
    tokens_I1 = np.maximum(record.tokens[:, None], 1)
    entropy_I = (record.entropy / tokens_I1).mean(1)
    return {
        "moe/routing/token": float(np.mean([information(record.ids[r]).share for r in routers])),
        "moe/routing/previous_token": float(np.mean([information(record.previous[r]).share
                                                     for r in routers])),
        "moe/routing/position": float(np.mean([information(record.positions[r]).share for r in routers])),
        "moe/routing/domain": float(np.mean([information(record.by_domain[r]).share for r in routers])),
        "moe/routing/largest_share": max(largest_share(record, r) for r in routers),
        "moe/routing/collapsed": sum(collapsed(record, r) for r in routers),
        "moe/routing/unrouted": float((record.unrouted[0] / tokens_I1[0]).mean()),
        "moe/routing/entropy": float(entropy_I[0]),
        "moe/routing/entropy_shifted": float(entropy_I[1]),
    }


def collapsed_routers(record: RoutingRecord) -> Mapping[str, float]:
    """The collapsed routers, with the share of tokens that their most used expert takes."""
    return {str(name): largest_share(record, r) for r, name in enumerate(record.routers)
            if collapsed(record, r)}


def _alike(before: RoutingRecord, after: RoutingRecord) -> bool:
    return (np.array_equal(before.probe, after.probe) and before.first.shape == after.first.shape
            and np.array_equal(before.routers, after.routers))


def _entropy(shares: np.ndarray) -> float:
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum())
