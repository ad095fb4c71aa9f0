"""Deduplication, and the split into training and held-out text as a pure function of the documents' contents.

Exact duplicates go first, so that no text is on both sides. With a share of 1/20, a document whose hash is 0
modulo 20 is held out. Two exceptions keep every domain measurable. If there are so few documents in all that
this would hold out less than one, each gives up its last twentieth. A domain that the hash leaves without
held-out text gives its document of smallest hash, or the last twentieth of its only one.

Held-out text that the user provides stays whole; its texts are removed from the training documents.
"""

from fractions import Fraction
from typing import NamedTuple

import numpy as np

from moetrain.data.reading.documents import Documents, Parts

FEW = 20                        # documents; with so many, whole ones are held out however small the share
LEAST_CUT = 32                  # bytes; a document that would give up less is not cut


class Split(NamedTuple):
    """Training and held-out text, each as parts of documents."""

    train: Parts
    heldout: Parts


def unique(documents: Documents) -> tuple[Parts, Parts]:
    """Remove exact duplicates. The order in which documents came does not matter.

    Returns:
        Each content once, sorted by domain and content, and the documents that were dropped.
    """
    ranks = np.argsort(sorted(range(len(documents.names)), key=documents.names.__getitem__)).astype(np.int32)
    order = np.lexsort((documents.digests, ranks[documents.domains]))
    _, first = np.unique(documents.digests[order], return_index=True)
    kept = np.zeros(len(order), bool)
    kept[first] = True
    return documents.whole(order[kept]), documents.whole(order[~kept])


def cap_domains(parts: Parts, cap: int | None) -> Parts:
    """The first `cap` bytes of each domain; the last document taken is cut.

    Args:
        parts: whole documents, sorted by domain.
        cap: bytes a domain; None takes all.
    """
    if cap is None or not len(parts):
        return parts
    starts = _domain_starts(parts)
    before = np.cumsum(parts.ends) - parts.ends
    before -= np.repeat(before[starts], np.diff([*starts, len(parts)]))
    ends = np.minimum(parts.ends, cap - before)
    return Parts(parts.documents, parts.rows, parts.starts, ends).at(ends > 0)


def as_fraction(share: float) -> Fraction:
    """A share as a fraction of small numbers: 1/20 for 0.05."""
    return Fraction(share).limit_denominator(10_000)


def split(parts: Parts, *, share: Fraction, heldout_limit: int | None = None) -> Split:
    """Split documents into training and held-out text, both in the order of the documents.

    Args:
        parts: unique documents from their start on, sorted by domain and content.
        share: share of the documents that is held out.
        heldout_limit: bytes of a held-out document that are used; None uses all.
    """
    starts = _domain_starts(parts)
    sizes = np.diff([*starts, len(parts)])
    few = len(parts) < min(FEW, 1 / share)
    each = np.repeat(few | (sizes == 1), sizes)                     # these give up their end
    given = np.where(each, parts.ends * share.numerator // share.denominator, 0)
    given[given < LEAST_CUT] = 0
    whole = _held_out(parts, share, starts, starts + sizes - 1) & ~each
    train = Parts(parts.documents, parts.rows, parts.starts, parts.ends - given).at(~whole)
    ends = parts.ends
    if heldout_limit is not None:
        ends = np.where(whole, np.minimum(ends, heldout_limit), ends)
    heldout = Parts(parts.documents, parts.rows, np.where(whole, 0, parts.ends - given), ends)
    return Split(train, heldout.at(whole | (given > 0)))


def without(parts: Parts, others: Parts) -> tuple[Parts, Parts]:
    """The documents whose content is not among the others, and those whose content is."""
    also = np.isin(parts.digests, others.digests)
    return parts.at(~also), parts.at(also)


def _domain_starts(parts: Parts) -> np.ndarray:
    """int64 [domains], indices at which the domain changes."""
    return np.flatnonzero(np.diff(parts.domains, prepend=-1))


def _held_out(parts: Parts, share: Fraction, firsts: np.ndarray, lasts: np.ndarray) -> np.ndarray:
    """Choose whole documents to hold out: some of every domain, but not all.

    Args:
        parts: unique documents, sorted by domain and content.
        share: share of the documents that is held out.
        firsts: int64 [domains], index of each domain's document of smallest hash.
        lasts: int64 [domains], index of each domain's document of largest hash.

    Returns:
        bool [documents].
    """
    numbers = parts.digests.view(">u8")[::4]
    chosen = numbers % share.denominator < share.numerator
    chosen[firsts[~np.logical_or.reduceat(chosen, firsts)]] = True
    chosen[lasts[np.logical_and.reduceat(chosen, firsts)]] = False
    return chosen
