"""Which text is trained on and which is held out, as a pure function of the documents' contents.

Exact duplicates go first, so that no text is on both sides. With a share of 1/20, a document whose hash is 0 modulo 20 is
held out. Two exceptions keep every domain measurable: documents that are so few in all that this would hold out less
than one give up their last twentieth each, and a domain that the hash leaves without held-out text gives its document of
smallest hash, or the last twentieth of its only one.

Held-out text of the user's own stays whole: what of it also occurs among the training documents is taken out there.
"""

from fractions import Fraction
from typing import NamedTuple

import numpy as np

from moetrain.data.reading.documents import Documents, Parts

FEW = 20                        # documents: from here on whole ones are held out, however small the share
LEAST_CUT = 32                  # bytes; a document that would give up less is not cut


class Split(NamedTuple):
    train: Parts
    heldout: Parts


def unique(documents: Documents) -> tuple[Parts, Parts]:
    """(each content once, sorted by domain and content, the others): the order in which they came is forgotten."""
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
        cap: None for all.
    """
    if cap is None or not len(parts):
        return parts
    starts = _domain_starts(parts)
    before = np.cumsum(parts.ends) - parts.ends
    before -= np.repeat(before[starts], np.diff([*starts, len(parts)]))
    ends = np.minimum(parts.ends, cap - before)
    return Parts(parts.documents, parts.rows, parts.starts, ends).at(ends > 0)


def exact(share: float) -> Fraction:
    """The share as a fraction of small numbers: 1/20 for 0.05."""
    return Fraction(share).limit_denominator(10_000)


def split(parts: Parts, *, share: Fraction, heldout_limit: int | None = None) -> Split:
    """Both sides, in the order of the documents.

    Args:
        parts: unique documents from their start on, sorted by domain and content.
        share: of the documents, to be held out.
        heldout_limit: bytes of a held-out document that are used.
    """
    starts = _domain_starts(parts)
    sizes = np.diff([*starts, len(parts)])
    few = len(parts) < min(FEW, 1 / share)
    each = np.repeat(few | (sizes == 1), sizes)                     # gives up its end
    given = np.where(each, parts.ends * share.numerator // share.denominator, 0)
    given[given < LEAST_CUT] = 0
    whole = _held_out(parts, share, starts, starts + sizes - 1) & ~each
    train = Parts(parts.documents, parts.rows, parts.starts, parts.ends - given).at(~whole)
    ends = parts.ends if heldout_limit is None else np.where(whole, np.minimum(parts.ends, heldout_limit),
                                                             parts.ends)
    heldout = Parts(parts.documents, parts.rows, np.where(whole, 0, parts.ends - given),
                    ends).at(whole | (given > 0))
    return Split(train, heldout)


def without(parts: Parts, others: Parts) -> tuple[Parts, Parts]:
    """(the documents whose content is not among the others', those whose is)."""
    also = np.isin(parts.digests, others.digests)
    return parts.at(~also), parts.at(also)


def _domain_starts(parts: Parts) -> np.ndarray:
    """The places at which another domain begins."""
    return np.flatnonzero(np.diff(parts.domains, prepend=-1))


def _held_out(parts: Parts, share: Fraction, firsts: np.ndarray, lasts: np.ndarray) -> np.ndarray:
    """Which documents are held out, of every domain some and not all. firsts, lasts: their smallest and their largest hash."""
    numbers = parts.digests.view(">u8")[::4]
    chosen = numbers % share.denominator < share.numerator
    chosen[firsts[~np.logical_or.reduceat(chosen, firsts)]] = True
    chosen[lasts[np.logical_and.reduceat(chosen, firsts)]] = False
    return chosen
