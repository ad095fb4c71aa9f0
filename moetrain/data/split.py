"""Which text is trained on and which is held out, as a pure function of the documents' contents.

Exact duplicates go first, so that no text is on both sides. With a share of 1/20, a document whose hash is 0 modulo 20 is
held out. Two exceptions keep every domain measurable: documents that are so few in all that this would hold out less
than one give up their last twentieth each, and a domain that the hash leaves without held-out text gives its document of
smallest hash, or the last twentieth of its only one.

Held-out text of the user's own stays whole: what of it also occurs among the training documents is taken out there.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import groupby
from typing import NamedTuple

from moetrain.data.document import Document
from moetrain.data.text import character_start

FEW = 20                        # documents: from here on whole ones are held out, however small the share
LEAST_CUT = 32                  # bytes; a document that would give up less is not cut


class Part(NamedTuple):
    """Bytes start to end of a document, each moved back to the start of a character."""

    document: Document
    start: int
    end: int

    def blocks(self) -> Iterator[bytes]:
        place = 0
        for block in self.document.blocks():
            first, last = (character_start(block, min(max(cut - place, 0), len(block))) for cut in (self.start, self.end))
            if first < last:
                yield block[first:last]
            place += len(block)


class Split(NamedTuple):
    train: list[Part]
    heldout: list[Part]


def unique(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """(each content once, sorted by domain and content, the others): the order in which they came is forgotten."""
    kept, duplicates, seen = [], [], set()
    for document in sorted(documents, key=lambda document: (document.domain, document.digest)):
        (duplicates if document.digest in seen else kept).append(document)
        seen.add(document.digest)
    return kept, duplicates


def cap_domains(documents: list[Document], cap: int | None) -> list[Document]:
    """The first `cap` bytes of each domain; the last document taken is cut."""
    if cap is None:
        return documents
    taken, sizes = [], dict.fromkeys((document.domain for document in documents), 0)
    for document in documents:
        size = min(document.size, cap - sizes[document.domain])
        if size > 0:
            taken.append(document._replace(size=size))
            sizes[document.domain] += size
    return taken


def exact(share: float) -> Fraction:
    """The share as a fraction of small numbers: 1/20 for 0.05."""
    return Fraction(share).limit_denominator(10_000)


def split(documents: list[Document], *, share: Fraction, heldout_limit: int | None = None) -> Split:
    """Parts in the order of the documents.

    Args:
        documents: unique and sorted by domain.
        share: of the documents, to be held out.
        heldout_limit: bytes of a held-out document that are used.
    """
    result = Split([], [])
    few = len(documents) < min(FEW, 1 / share)
    for _, group in groupby(documents, key=lambda document: document.domain):
        members = list(group)
        if few or len(members) == 1:
            _cut_each(members, share, result)
            continue
        chosen = _held_out(members, share)
        for document in members:
            if document.digest in chosen:
                result.heldout.append(Part(document, 0, min(document.size, heldout_limit or document.size)))
            else:
                result.train.append(Part(document, 0, document.size))
    return result


def without(documents: list[Document], others: list[Document]) -> tuple[list[Document], list[Document]]:
    """(the documents whose content is not among the others', those whose is)."""
    digests = {document.digest for document in others}
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        sides[document.digest in digests].append(document)
    return sides


def whole(train: list[Document], heldout: list[Document]) -> Split:
    """All of the documents, as far as they are not capped."""
    return Split(*([Part(document, 0, document.size) for document in side] for side in (train, heldout)))


def _held_out(members: list[Document], share: Fraction) -> set[bytes]:
    """Digests of the held-out documents of a domain: never none, never all."""
    by_hash = sorted(document.digest for document in members)
    chosen = {digest for digest in by_hash if int.from_bytes(digest[:8]) % share.denominator < share.numerator}
    chosen = chosen or {by_hash[0]}
    return chosen - {by_hash[-1]} if len(chosen) == len(members) else chosen


def _cut_each(members: list[Document], share: Fraction, result: Split) -> None:
    for document in members:
        held = document.size * share.numerator // share.denominator
        held = held if held >= LEAST_CUT else 0
        result.train.append(Part(document, 0, document.size - held))
        if held:
            result.heldout.append(Part(document, document.size - held, document.size))
