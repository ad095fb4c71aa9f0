"""Values of the pictures of routing (routing_pictures.py), from the records of log.routing.

The last evaluation on each data is shown by router, and all evaluations over steps. runs/routing_record.py
defines the measures.

Shapes: R routers, S evaluations.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrain.errors import DataError
from moetrain.report.arrays import Form, read_arrays
from moetrain.runs.routing_record import (
    DECILES,
    RoutingLog,
    RoutingRecord,
    churn,
    flips,
    information,
    largest_share,
)

# What may tell of the expert: table of the record, and its name in pictures.
SOURCES = {"ids": "token id", "previous": "previous token id", "positions": "position", "by_domain": "domain"}

_R, _E, _I, _N = "routers", "experts of the largest router", "inputs", "tokens of the probe"
FORMS = {
    "step": Form("integers", ()), "routers": Form("text", (_R,)), "experts": Form("integers", (_R,)),
    "inputs": Form("text", (_I,)), "domains": Form("text", ("domains",)), "tokens": Form("integers", (_I,)),
    "ids": Form("integers", (_R, "token ids", _E)), "previous": Form("integers", (_R, "token ids", _E)),
    "positions": Form("integers", (_R, "stretches", _E)),
    "by_domain": Form("integers", (_R, "domains", _E)), "pairs": Form("integers", (_R, _R, _E, _E)),
    "chosen": Form("integers", (_I, _R, "deciles")), "dropped": Form("integers", (_I, _R, "deciles")),
    "unrouted": Form("integers", (_I, _R)), "entropy": Form("numbers", (_I, _R)),
    "spread": Form("numbers", (_R, "parts of the spread")), "probe": Form("integers", ("windows",)),
    "first": Form("integers", (_R, _N)), "active": Form("integers", (_R, _N, "bytes of experts")),
}


class Evaluations(NamedTuple):
    """The records of a run."""

    own: list[RoutingRecord]              # on what it held out, by step; at least one
    other: dict[str, RoutingRecord]       # the last one on each other data, by fingerprint

    @property
    def last(self) -> RoutingRecord:
        """The last record on what the run held out."""
        return self.own[-1]

    @property
    def steps(self) -> np.ndarray:
        """Steps of the records on what the run held out, [S]."""
        return np.array([int(record.step) for record in self.own])


def read_evaluations(directory: Path) -> Evaluations | None:
    """Read the records of a run; None where there is none on what it held out."""
    own, other = [], {}
    for path in RoutingLog(directory).paths():
        data = path.name.split(".")[1]
        if data == "npz":
            own.append(read_record(path))
        else:
            other[data] = read_record(path)
    same = [record for record in own if np.array_equal(record.routers, own[-1].routers)]
    return Evaluations(same, other) if own else None


def read_record(path: Path) -> RoutingRecord:
    """Read a record; DataError where it is damaged."""
    try:
        record = RoutingRecord(**read_arrays(path, FORMS))
        counts = [getattr(record, name) for name, form in FORMS.items()
                  if form.kind == "integers" and name not in ("first", "step", "active")]
        if not record.by_domain.size or any(count.size and count.min() < 0 for count in counts):
            raise ValueError("there are no choices in it, or negative ones")
        if record.experts.min() < 1 or record.experts.max() > record.ids.shape[-1]:
            raise ValueError("a router has no experts, or more than there is room for")
        if len(record.inputs) != 2 or record.chosen.shape[-1] != DECILES or record.spread.shape[-1] != 2:
            raise ValueError("it has other inputs, deciles or parts than this release records")
        if not np.isfinite(record.entropy).all() or not np.isfinite(record.spread).all():
            raise ValueError("an entropy or a spread is no finite number")
    except ValueError as error:
        raise DataError(64, "the routing of an evaluation cannot be read", where=str(path), why=str(error),
                        next="move it away: it is written at every evaluation with log.routing=true"
                        ) from error
    return record


def told(record: RoutingRecord, source: str) -> np.ndarray:
    """Share of what there is to know of the expert that a source tells, [R]."""
    return np.array([information(table).share for table in getattr(record, source)])


def told_over_steps(found: Evaluations, source: str) -> np.ndarray:
    """The same at every evaluation, mean over routers, [S]."""
    return np.array([told(record, source).mean() for record in found.own])


def churn_between(found: Evaluations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Changes from each evaluation to the next.

    Returns:
        Steps of the later ones; shares of tokens with another first choice, [S - 1, R]; experts that a token
        takes up or leaves, [S - 1, R]. Evaluations with another probe are left out.
    """
    steps, shares, counts = [], [], []
    for before, after in zip(found.own, found.own[1:]):
        share, count = churn(before, after), flips(before, after)
        if share is not None and count is not None:
            steps.append(int(after.step))
            shares.append(share)
            counts.append(count)
    routers = len(found.last.routers)
    return np.array(steps), np.reshape(shares, (-1, routers)), np.reshape(counts, (-1, routers))


def churn_to_last(found: Evaluations) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean share of tokens whose first choice differs from the last evaluation's."""
    pairs = [(int(record.step), churn(record, found.last)) for record in found.own[:-1]]
    kept = [(step, share.mean()) for step, share in pairs if share is not None]
    return np.array([step for step, _ in kept]), np.array([share for _, share in kept])


def layer_information(record: RoutingRecord) -> np.ndarray:
    """Share of what there is to know of a later layer's first choice that an earlier one's tells, [R, R].

    NaN on and below the diagonal.
    """
    routers = len(record.routers)
    shares = np.full((routers, routers), np.nan)
    for one in range(routers):
        for other in range(one + 1, routers):
            shares[one, other] = information(record.pairs[one, other]).share
    return shares


def by_input(found: Evaluations) -> list[tuple[str, RoutingRecord]]:
    """Every input that was measured, with its record: held-out text, and other data."""
    return [("held-out text", found.last),
            *((f"other data {data}", record) for data, record in found.other.items())]


def entropies(found: Evaluations) -> dict[str, np.ndarray]:
    """Entropy by router over its largest possible value, [R], for each input; other data as it stands."""
    scale_R = np.log(np.maximum(found.last.experts, 2))
    of = {}
    for name, record in by_input(found):
        mean_IR = record.entropy / np.maximum(record.tokens[:, None], 1)
        if mean_IR.shape[1] == len(scale_R):
            of[name] = mean_IR[0] / scale_R
            if record is found.last:
                of["the same in random order"] = mean_IR[1] / scale_R
    return of


def drop_rates(found: Evaluations) -> dict[str, np.ndarray]:
    """Share of the slots in each decile of the sequence that capacity drops, [10], for each input."""
    of = {}
    for name, record in by_input(found):
        rates = record.dropped.sum(1) / np.maximum(record.chosen.sum(1), 1)
        of[name] = rates[0]
        if record is found.last:
            of["the same in random order"] = rates[1]
    return of


def explained(record: RoutingRecord) -> np.ndarray:
    """Share of the spread of the routers' inputs that lies between the means of first choices, [R]."""
    return record.spread[:, 0] / np.where(record.spread[:, 1] > 0, record.spread[:, 1], 1)


def rows(found: Evaluations) -> Iterator[list[object]]:
    """Rows of routing.csv: one for each value in the pictures."""
    yield ["picture", "step", "router", "input or place", "value"]
    names = [str(name) for name in found.last.routers]
    for record in found.own:
        step = int(record.step)
        for source, title in SOURCES.items():
            for name, share in zip(names, told(record, source)):
                yield ["information", step, name, title, f"{share:.6g}"]
        for r, name in enumerate(names):
            yield ["experts", step, name, "largest share", f"{largest_share(record, r):.6g}"]
            yield ["experts", step, name, "without an expert",
                   f"{record.unrouted[0, r] / max(1, int(record.tokens[0])):.6g}"]
            yield ["experts", step, name, "spread between choices", f"{explained(record)[r]:.6g}"]
    for step, shares, counts in zip(*churn_between(found)):
        for name, share, count in zip(names, shares, counts):
            yield ["churn", step, name, "first choice", f"{share:.6g}"]
            yield ["churn", step, name, "flips", f"{count:.6g}"]
    last = int(found.last.step)
    for one, row in zip(names, layer_information(found.last)):
        for other, share in zip(names, row):
            if share == share:
                yield ["layers", last, other, f"told by {one}", f"{share:.6g}"]
    for title, of_routers in entropies(found).items():
        for name, share in zip(names, of_routers):
            yield ["entropy", last, name, title, f"{share:.6g}"]
    for title, of_deciles in drop_rates(found).items():
        for decile, rate in enumerate(of_deciles):
            yield ["drops", last, "all", f"{title}, tenth {decile + 1}", f"{rate:.6g}"]
