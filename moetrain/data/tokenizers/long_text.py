"""Encoding of texts of any length in bounded memory, with the ids of the whole text.

A long text is encoded in pieces that overlap by ZONE characters. Every zone is also encoded by itself. A zone
ends where the left piece ends, so the ids of both agree from some token to the end; it begins where the right
piece begins, so the ids of those agree from the start up to some token. Where both agreements hold for LEAST
tokens in a row, the pieces are joined in the middle of that run: ids left of it had their true left context,
ids right of it their true right context.

For BPE this is a proof: ids are those of the whole text iff each two neighbors are those of their own text
(Berglund and van der Merwe, 2023, "Formalizing BPE tokenization"), and the two ids that meet are neighbors in
both pieces. Unigram takes the most probable segmentation of each word. Where several are equally probable, as
in a repeated letter, rounding decides, which depends on everything before it in the word; its pieces are
joined between two words.

Pieces that agree nowhere, as inside one word that is longer than a zone, are encoded as one piece, which
doubles until it meets the next one; in the end it is the whole text.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moetrain.data.tokenizers.utf8_decoder import Decoder

PIECE = 1 << 17                      # characters that are encoded at once
ZONE = 1 << 12                       # characters that two pieces share
LEAST = 32                           # tokens in a row on which both pieces have to agree
# Bytes of a batch: several pieces for every core. More would take memory (150 bytes a token), not save time.
BATCH = PIECE * min(max(os.cpu_count() or 1, 8), 32)


class Encoded(NamedTuple):
    """Some tokens of a document.

    Args:
        ids: int64 [tokens].
        sizes: int64 [tokens], bytes of the text that each token covers, from the end of all earlier tokens to
            its own end. What the tokenizer drops counts with the next token, at the end of a document with
            the end id. The sizes add up to the bytes of the document. None where they were not asked for.
        text_bytes: bytes of the text that were read for these tokens; they add up to the bytes of the
            document, too.
        last: whether the document ends here; then the last id is the end id.
    """

    ids: np.ndarray
    sizes: np.ndarray | None
    text_bytes: int
    last: bool


class Ids(NamedTuple):
    """Encoding of one text.

    Args:
        ids: int64 [tokens].
        ends: int64 [tokens], for each id the character behind its last one; None where not asked for.
    """

    ids: np.ndarray
    ends: np.ndarray | None


# (texts, whether ends are wanted) -> one Ids for each text
EncodeBatch = Callable[[list[str], bool], list[Ids]]
Words = Callable[[str], np.ndarray]


class UnjoinableError(Exception):
    """The ids of the start of a text depend on its far end, so it cannot be encoded in pieces."""


@dataclass
class _Piece:
    """Consecutive characters of a document.

    Args:
        text: the characters.
        widths: uint8 [characters], bytes that each character comes from.
        overlap: number of leading characters that the piece before shares; 0 for the first piece.
        start: bytes of the document before the first character.
        text_bytes: bytes that were read for this piece and not counted with an earlier one.
        last: whether the document ends with this piece.
    """

    text: str
    widths: np.ndarray
    overlap: int
    start: int
    text_bytes: int
    last: bool

    def append(self, other: "_Piece") -> None:
        self.text += other.text[other.overlap:]
        self.widths = np.concatenate([self.widths, other.widths[other.overlap:]])
        self.text_bytes += other.text_bytes
        self.last = other.last


class LongTexts:
    """Encoder of documents: many short ones at a time, or a part of a long one.

    Args:
        encode: encodes a batch of texts, each by itself.
        end_id: the id that follows every document.
        words: numbers the word of each token of a text; pieces are then joined only between words.
        piece: characters that are encoded at once.
        zone: characters that two pieces share.
    """

    def __init__(self, encode: EncodeBatch, *, end_id: int, words: Words | None = None, piece: int = PIECE,
                 zone: int = ZONE) -> None:
        assert 0 < 2 * zone <= piece, (zone, piece)
        self._encode, self._end_id, self._words, self._piece, self._zone = encode, end_id, words, piece, zone

    def documents(self, documents: Iterable[Iterable[bytes]], *, sizes: bool) -> Iterator[Encoded]:
        """The tokens of documents, one after another, each followed by the end id."""
        joint = _PieceJoiner(self._encode, self._end_id, self._words, self._zone, sizes)
        batch: list[_Piece] = []
        waiting = 0
        for blocks in documents:
            for piece in _pieces(blocks, self._piece, self._zone):
                batch.append(piece)
                waiting += piece.text_bytes
                if waiting >= BATCH:
                    yield from joint.add(batch)
                    batch, waiting = [], 0
        yield from joint.add(batch)


def _pieces(blocks: Iterable[bytes], size: int, zone: int) -> Iterator[_Piece]:
    """Cut a document into pieces; there is at least one.

    All but the last have `size` characters, and the last has more than it shares with the one before.
    """
    decoder, text, widths = Decoder(), "", np.zeros(0, np.uint8)
    overlap = start = unreported = 0
    for block, last in _with_last(blocks):
        more, more_widths = decoder.add(block, last=last)
        text, widths, unreported = text + more, np.concatenate([widths, more_widths]), unreported + len(block)
        place = 0
        while len(text) - place > size + zone:
            piece_widths = widths[place:place + size]
            yield _Piece(text[place:place + size], piece_widths, overlap, start, unreported, False)
            start += int(piece_widths[:size - zone].sum(dtype=np.int64))
            place, overlap, unreported = place + size - zone, zone, 0
        text, widths = text[place:], widths[place:]
    yield _Piece(text, widths, overlap, start, unreported, True)


def _with_last(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Every block, and whether it is the last one. Without any block, one empty last block."""
    held = b""
    for block in blocks:
        if held:
            yield held, False
        held = block
    yield held, True


class _PieceJoiner:
    """Joins the encodings of pieces in the order in which they come.

    `_left` is the piece whose last ids are not yet given out, because the next piece decides where they end.
    `_left_ids` holds its ids and those of its zone; it is None while the piece grows, up to `_grown`
    characters. `_taken` counts the ids at its start that the piece before gave out. `_covered` counts the
    bytes of the document under all ids given out.
    """

    def __init__(self, encode: EncodeBatch, end_id: int, words: Words | None, zone: int, sizes: bool) -> None:
        self._encode, self._end_id, self._words, self._zone, self._sizes = encode, end_id, words, zone, sizes
        self._left: _Piece | None = None
        self._left_ids: tuple[Ids, Ids | None] | None = None
        self._before = np.zeros(0, np.int64)
        self._taken = self._covered = self._grown = 0

    def add(self, batch: list[_Piece]) -> Iterator[Encoded]:
        zones = [piece.text[-self._zone:] for piece in batch if not piece.last]
        encoded = self._encode([piece.text for piece in batch] + zones, self._sizes)
        of_zones = iter(encoded[len(batch):])
        for piece, ids in zip(batch, encoded):
            yield from self._join(piece, (ids, None if piece.last else next(of_zones)))

    def _join(self, piece: _Piece, ids: tuple[Ids, Ids | None]) -> Iterator[Encoded]:
        if not piece.overlap:
            self._begin(piece, ids, 0)
            self._covered = 0
        elif self._left_ids is not None and (place := self._meeting(ids[0].ids)) is not None:
            zone_ids = self._left_ids[1].ids
            yield self._given(len(self._left_ids[0].ids) - (len(zone_ids) - place))
            self._begin(piece, ids, place)
        else:
            self._grow(piece)
        if self._left.last:
            yield self._given(len(self._left_ids[0].ids))
            self._left = self._left_ids = None

    def _begin(self, piece: _Piece, ids: tuple[Ids, Ids | None], taken: int) -> None:
        self._left, self._left_ids, self._taken, self._grown = piece, ids, taken, 0
        self._before = ids[0].ids[:taken]

    def _meeting(self, right: np.ndarray) -> int | None:
        """Index into the zone's ids at which to cut both pieces; None if they agree for too few tokens."""
        left, zone = self._left_ids[0].ids[self._taken:], self._left_ids[1].ids
        first = len(zone) - _agreement(left[::-1], zone[::-1])
        behind = _agreement(right, zone)
        if behind - first < LEAST:
            return None
        middle = (first + behind) // 2
        if self._words is None:
            return middle
        words = self._words(self._left.text[-self._zone:])[first:behind]
        between = first + 1 + np.flatnonzero(np.diff(words))
        return int(between[np.argmin(np.abs(between - middle))]) if len(between) else None

    def _grow(self, piece: _Piece) -> None:
        """Append a piece to the left one, and encode the result anew once it is twice as long."""
        if self._left_ids is not None:
            self._grown, self._left_ids = 2 * len(self._left.text), None
        self._left.append(piece)
        if len(self._left.text) < self._grown and not piece.last:
            return
        texts = [self._left.text] if piece.last else [self._left.text, self._left.text[-self._zone:]]
        ids = self._encode(texts, self._sizes)
        if not np.array_equal(ids[0].ids[:self._taken], self._before):
            raise UnjoinableError
        self._left_ids = (ids[0], None if piece.last else ids[1])

    def _given(self, end: int) -> Encoded:
        """The ids of the left piece up to `end`, with the end id where the document ends there."""
        piece, ids = self._left, self._left_ids[0]
        chosen, sizes = ids.ids[self._taken:end], None
        if self._sizes:
            bytes_before = np.concatenate([[0], np.cumsum(piece.widths, dtype=np.int64)])
            ends = piece.start + bytes_before[ids.ends[self._taken:end]]
        if piece.last:
            chosen = np.append(chosen, self._end_id)
        if self._sizes:
            whole = piece.start + int(piece.widths.sum(dtype=np.int64))
            ends = np.concatenate([[self._covered], ends, [whole] if piece.last else []])
            ends = np.maximum.accumulate(ends).astype(np.int64)
            sizes, self._covered = np.diff(ends), int(ends[-1])
        return Encoded(chosen, sizes, piece.text_bytes, piece.last)


def _agreement(first: np.ndarray, second: np.ndarray) -> int:
    """Number of leading ids that are equal."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
