"""The id that closes a document in tokens written by another program.

Three sources may say it: data.end_token, the tokenizer of the ids, and the documents themselves if something
else than the id marks where they end. Sources that contradict each other are refused: a run would generate
endlessly, waiting for an id that it was never shown.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

from moetrain.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from moetrain.errors import DataError

ALMOST_ALL = 0.95
FEW = 8                                          # fewer documents may end alike by chance

log = logging.getLogger(__name__)


class Endings(NamedTuple):
    """How the documents of a file end.

    Args:
        where: the file.
        documents: number of its documents.
        id: the most frequent last token.
        share: share of the documents that end in it.
        inside: how often the id occurs inside documents.
    """

    where: str
    documents: int
    id: int
    share: float
    inside: int

    @property
    def closing(self) -> int | None:
        """The id if it closes documents, else None.

        Almost all documents end in it, and unlike the end of a line it hardly occurs elsewhere.
        """
        hardly = self.inside <= (1 - ALMOST_ALL) * self.documents
        return self.id if self.documents >= FEW and self.share >= ALMOST_ALL and hardly else None


def open_tokenizer(name: str, end_token: str | None) -> tuple[Tokenizer | None, int | None]:
    """The tokenizer of data.tokenizer, and the id that data.end_token names; each may be None."""
    if name == "none":
        if end_token is not None and not end_token.isdecimal():
            raise DataError(163, "the end token does not fit the data", where=f"data.end_token={end_token}",
                            why="data.tokenizer=none knows numbers alone",
                            next="data.end_token=<id>, or data.tokenizer=<tokenizer.json>")
        return None, end_token if end_token is None else int(end_token)
    if end_token is None or not end_token.isdecimal():
        encoder = load_tokenizer(name, end_token=end_token)
        return encoder, None if end_token is None else encoder.end_id
    encoder = load_tokenizer(name, end_id=int(end_token))
    return encoder, encoder.end_id


def closing_id(found: Sequence[Endings], *, typed: int | None, encoder: Tokenizer | None) -> int | None:
    """Determine the id that closes documents, and set it in the tokenizer.

    Args:
        found: how the documents of each file end.
        typed: id that data.end_token names.
        encoder: tokenizer of the ids.

    Returns:
        The id; None if nothing says it.
    """
    known = [(endings, endings.closing) for endings in found if endings.closing is not None]
    wanted = typed if typed is not None else encoder.end_id if encoder else None
    for endings, id in known:
        expected = wanted if wanted is not None else known[0][1]
        if id == expected:
            continue
        says = ("data.end_token says" if typed is not None else "the tokenizer ends a text with" if encoder
                else f"those of {known[0][0].where} end in")
        why = f"{endings.share:.1%} of its {endings.documents:,} documents end in id {id}, {says} {expected}"
        if typed is None:
            raise DataError(163, "the end token does not fit the data", where=endings.where, why=why,
                            next=f"data.end_token={id}, or the data.tokenizer that made the ids")
        log.warning("%s: %s", endings.where, why)
    end = wanted if wanted is not None else known[0][1] if known else None
    if unknown := [endings for endings in found if endings.closing is None and endings.documents >= FEW]:
        most = unknown[0]
        log.warning("%s: nothing marks where a document ends (the most frequent last id, %d, ends %.0f %% of "
                    "%s documents): preprocess with --append-eod",
                    most.where, most.id, 100 * most.share, f"{most.documents:,}")
    if encoder is not None and end is not None:
        encoder.end_id = end
    return end
