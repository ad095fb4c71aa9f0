"""Inspection of a corpus before it is prepared: account, domains, estimated tokens and three documents.

It is read as `prepare` reads it (`corpus/selection.py`), but nothing is written: texts of compressed files
and of records pass through a nameless temporary file. Tokens are counted in a sample of documents that is
chosen by hash, so two inspections agree.
"""

import heapq
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrain.config.schema import Config
from moetrain.data.account.ledgers import FileLedger
from moetrain.data.corpus.selection import Progress, Selection, find_source, left_out_error, select
from moetrain.data.corpus.split import as_fraction
from moetrain.data.preparation.by_fingerprint import prepared_place
from moetrain.data.reading.documents import Document, Part, Parts
from moetrain.data.reading.records import reading_of
from moetrain.data.reading.spool import Spool
from moetrain.data.reading.text_blocks import character_start
from moetrain.data.tokenizers.tokenizer import Tokenizer, configured_tokenizer
from moetrain.errors import DataError

SHOWN = 3                           # documents shown
SHOWN_TOKENS = 64                   # of each of them
_SAMPLE = 64                        # documents in which tokens are counted
_SAMPLE_BYTES = 1 << 16             # of each of them
_SPOOL_BYTES = 64 << 20             # largest size of the temporary file, beside one document


class Inspection(NamedTuple):
    """What an inspection found.

    Args:
        ledgers: files at data.path and data.held_out.
        found: the findings as a record; None if `error` ended the reading.
        error: the error that `prepare` would raise; None if there is none.
    """

    ledgers: list[FileLedger]
    found: dict[str, Any] | None
    error: DataError | None


class _Sample:
    """Beginnings of the documents of smallest hash."""

    def __init__(self, spool: Spool) -> None:
        self._spool, self._heap = spool, []          # (-hash, hash, beginning)

    def add(self, document: Document) -> None:
        """Consider a document that was just read."""
        place = -int.from_bytes(document.digest)
        if ((len(self._heap) < _SAMPLE or place > self._heap[0][0])
                and all(place != entry[0] for entry in self._heap)):
            entry = (place, document.digest, _beginning(document, self._spool))
            (heapq.heappush if len(self._heap) < _SAMPLE else heapq.heappushpop)(self._heap, entry)
        if self._spool.size > _SPOOL_BYTES:
            self._spool.cut(0)

    def texts(self) -> dict[bytes, bytes]:
        """Beginnings by digest, in the order of the hashes."""
        return {digest: text for _, digest, text in sorted(self._heap, reverse=True)}


def inspect(config: Config, run_dir: Path, progress: Progress | None = None) -> Inspection:
    """Read the text that a config names.

    DataError if there is nothing to read at all; other errors are part of the result.
    """
    data = config.data
    assert data.kind == "text", data.kind
    encoder = configured_tokenizer(data)
    out = prepared_place(data, run_dir)
    source = find_source(data.path, data.held_out, own=(out, run_dir), splits=data.split == "respect")
    ledgers = [scan.ledger for scan in (source.path, source.held_out) if scan]
    with Spool(Path(tempfile.gettempdir())) as spool:
        sample = _Sample(spool)
        try:
            selection = select(source, spool, share=as_fraction(data.held_out_share),
                               reading=reading_of(data), domain_cap=data.domain_cap, allow_left_out=1.0,
                               progress=progress, watch=sample.add)
        except DataError as error:
            return Inspection(ledgers, None, error)
    ledgers = selection.account.files
    error = next(filter(None, (left_out_error(ledger, data.allow_left_out) for ledger in ledgers)), None)
    return Inspection(ledgers, _described(selection, sample.texts(), encoder, config), error)


def _described(selection: Selection, sample: dict[bytes, bytes], encoder: Tokenizer,
               config: Config) -> dict[str, Any]:
    """The findings as a record."""
    sides = {"train": selection.parts.train, "heldout": selection.parts.heldout}
    rate = _tokens_a_byte(sample, encoder)
    by_domain = {side: parts.by_domain() for side, parts in sides.items()}
    names = sorted({name for found in by_domain.values() for name in found})
    domains = {name: {side: dict(zip(("documents", "bytes"), found.get(name, (0, 0))))
                      for side, found in by_domain.items()}
               for name in names}
    tokens = {side: round(rate * parts.bytes) + len(parts) for side, parts in sides.items()}
    a_step = config.train.global_batch * config.train.seq_len
    return {"account": selection.account.record(), "domains": domains,
            "tokens": {**tokens, "bytes_per_token": 1 / rate if rate else None,
                       "estimated": config.data.tokenizer != "bytes"},
            "steps": config.run.steps, "tokens_per_step": a_step,
            "epochs": config.run.steps * a_step / tokens["train"] if tokens["train"] else None,
            "documents": [_shown(part, sample[part.document.digest], encoder)
                          for part in _some(sides["train"], sample)]}


def _tokens_a_byte(sample: dict[bytes, bytes], encoder: Tokenizer) -> float:
    """Tokens for each byte of text in the sample."""
    return sum(len(encoder.encode(text)) for text in sample.values()) / max(sum(map(len, sample.values())), 1)


def _some(parts: Parts, sample: dict[bytes, bytes]) -> list[Part]:
    """Documents of the sample that are trained on, from as many domains as there are."""
    members = parts.at(np.isin(parts.digests, np.array(list(sample), "S32")))
    by_digest = {part.document.digest: part for part in members}
    found = [by_digest[digest] for digest in sample if digest in by_digest]
    seen: dict[str, int] = {}
    order = []
    for part in found:
        turn = seen[part.document.domain] = seen.get(part.document.domain, 0) + 1
        order.append((turn, len(order), part))
    return [part for _, _, part in sorted(order, key=lambda place: place[:2])[:SHOWN]]


def _shown(part: Part, beginning: bytes, encoder: Tokenizer) -> dict[str, Any]:
    """The first tokens of a document as they are trained on, and their text."""
    ids = [int(token) for token in encoder.encode(beginning[:part.end])[:SHOWN_TOKENS]]
    whole = part.document.size <= len(beginning) and len(ids) < SHOWN_TOKENS
    return {"domain": part.document.domain, "bytes": part.document.size,
            "tokens": ids + [encoder.end_id] * whole, "text": encoder.decode(ids), "complete": whole}


def _beginning(document: Document, spool: Spool) -> bytes:
    """At most _SAMPLE_BYTES of a document, cut between characters."""
    text = b""
    for block in document.blocks(spool):
        text += block
        if len(text) > _SAMPLE_BYTES:
            return text[:character_start(text, _SAMPLE_BYTES)]
    return text
