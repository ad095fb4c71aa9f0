"""Token files of other programs as training data: the streams of `data=memmap` and `data=megatron`.

    TokenFile      a file, opened by its index (tokens/index.py)
    Member         a file in a domain, and how much of each document is trained on; the rest is held out
    TokenFiles     what batches/token_dataset.py reads in place of a prepared dataset

`tokens/blocks.py` reads the files with `pread`, never through a memory map: a file that is truncated while in
use raises an error, not SIGBUS. The fingerprint is made of the files' checksums.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrain.data.tokenizers.tokenizer import Tokenizer
from moetrain.data.tokens.blocks import Layout, TokenBlocks
from moetrain.data.tokens.index import FileErrors, TokenIndex
from moetrain.data.tokens.shards import BLOCK
from moetrain.errors import DataError

log = logging.getLogger(__name__)

SHARE = Fraction(1, 20)             # held out; only other shares enter a fingerprint


class TokenFile(NamedTuple):
    """An open file of token ids.

    Args:
        tokens: its ids.
        index: what was found when it was read whole.
        content: hash of the ids.
    """

    tokens: TokenBlocks
    index: TokenIndex
    content: str

    @property
    def starts(self) -> np.ndarray:
        """int64 [documents + 1], first token of every document, then the number of tokens."""
        return self.index.starts


class Member(NamedTuple):
    """A file in a domain.

    Args:
        domain: index of the domain.
        file: the file.
        trained: int64 [documents], leading tokens of each document that are trained on.
    """

    domain: int
    file: TokenFile
    trained: np.ndarray


@dataclass(frozen=True)
class TokenFiles:
    """Open token files, with the attributes of `Prepared` that training uses.

    Args:
        folder: path of the data, for errors.
        fingerprint: hash of the tokens and of how they are used.
        vocab_size: ids of the vocabulary.
        domains: names of the domains.
        tokenizer: meaning of the ids; None if unknown.
        end_id: id that closes a document; None if unknown.
        train: tokens to train on.
        heldout: held-out tokens.
        shares: share of the samples by domain, where the data itself gives them.
        members: the files behind the streams.
    """

    folder: Path
    fingerprint: str
    vocab_size: int
    domains: tuple[str, ...]
    tokenizer: Tokenizer | None
    end_id: int | None
    train: "FileStream"
    heldout: "FileStream"
    shares: Mapping[str, float] | None
    members: tuple[Member, ...]


class Spans(NamedTuple):
    """Ranges of tokens [first, first + length) in files, in order.

    Each is a document, or what remains of one. All columns are int64 [spans].
    """

    domain: np.ndarray
    file: np.ndarray
    first: np.ndarray
    length: np.ndarray


class FileStream:
    """Spans of several files under one range of addresses, with the methods of `TokenStream`.

    Args:
        files: the files that `spans` number.
        spans: ranges, sorted by domain.
        num_domains: all domains, also those without a span here.
        tokenizer: meaning of the ids.
    """

    def __init__(self, files: Sequence[TokenBlocks], spans: Spans, *, num_domains: int,
                 tokenizer: Tokenizer | None) -> None:
        self._files, self._tokenizer = files, tokenizer
        starts = np.concatenate([[0], np.cumsum(spans.length, dtype=np.int64)])
        self.size, self.document_starts = int(starts[-1]), starts[:-1]
        self.domain_bounds = starts[np.searchsorted(spans.domain, np.arange(num_domains + 1))]
        joined = (np.diff(spans.file) == 0) & (spans.first[1:] == (spans.first + spans.length)[:-1])
        begins = np.zeros(0, np.int64)
        if len(spans.file):
            begins = np.flatnonzero(np.concatenate([[True], ~joined]))
        self._run_file, self._run_first = spans.file[begins], spans.first[begins]
        self._run_start = starts[:-1][begins]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens `start` to `start + length` in the type of the files."""
        assert 0 <= start <= start + length <= self.size, (start, length, self.size)
        pieces, number = [], int(np.searchsorted(self._run_start, start, "right")) - 1
        while length > 0:
            end = int(self._run_start[number + 1]) if number + 1 < len(self._run_start) else self.size
            count = min(length, end - start)
            first = int(self._run_first[number]) + start - int(self._run_start[number])
            pieces.append(self._files[self._run_file[number]].read(first, first + count))
            start, length, number = start + count, length - count, number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint16), *pieces])

    def domain_range(self, domain: int) -> tuple[int, int]:
        """First address of a domain, and the one behind its last."""
        return int(self.domain_bounds[domain]), int(self.domain_bounds[domain + 1])

    def text_bytes(self, start: int, length: int) -> int | None:
        """Bytes of text under these tokens. Known for byte tokens only, else None."""
        if self._tokenizer is None or self._tokenizer.identity != "bytes":
            return None
        ids = self.read(start, length)
        return int(((ids < 256) & (ids != self._tokenizer.end_id)).sum())


def open_files(path: Path, kind: str, members: Sequence[Member], domains: Sequence[str], *, vocab_size: int,
               tokenizer: Tokenizer | None, end_id: int | None, settings: Sequence[object],
               shares: Mapping[str, float] | None = None) -> TokenFiles:
    """Build the streams of some files.

    Args:
        path: path of the data, for errors.
        kind: version of the fingerprint's format.
        members: the files, sorted by domain.
        domains: names of the domains, by index.
        vocab_size: ids of the vocabulary.
        tokenizer: meaning of the ids.
        end_id: id that closes a document.
        settings: what else decides which tokens are trained on, for the fingerprint.
        shares: share of the samples by domain.
    """
    files = [member.file.tokens for member in members]
    train, heldout = (FileStream(files, spans, num_domains=len(domains), tokenizer=tokenizer)
                      for spans in _sides(members))
    if not heldout.size:
        raise DataError(74, "there is too little data to hold some out", where=str(path),
                        why=f"{train.size:,} tokens in all",
                        next="data.path=<more data>, or data.held_out=<files to evaluate on>")
    described = [kind, tokenizer.identity if tokenizer else "none",
                 [(domains[member.domain], member.file.content, zlib.crc32(member.trained))
                  for member in members], *settings]
    fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    return TokenFiles(path, fingerprint, vocab_size, tuple(domains), tokenizer, end_id, train, heldout,
                      shares, tuple(members))


def _sides(members: Sequence[Member]) -> Iterator[Spans]:
    """Spans of the tokens that are trained on, then of those that are held out."""
    for held in (False, True):
        columns: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in Spans._fields]
        for number, (domain, file, trained) in enumerate(members):
            sizes = np.diff(file.starts)
            assert (len(trained) == len(sizes)
                    and ((trained >= 0) & (trained <= sizes)).all()), (number, len(sizes))
            length = sizes - trained if held else trained
            kept = length > 0
            first = file.starts[:-1] + (trained if held else 0)
            row = (np.full(len(sizes), domain), np.full(len(sizes), number), first, length)
            for column, values in zip(columns, row):
                column.append(values[kept])
        yield Spans(*map(np.concatenate, columns))


def last_share(file: TokenFile, share: Fraction) -> np.ndarray:
    """Tokens of each document to train on if the end of a file is held out.

    The cut moves to a border between two documents if one is near enough.
    """
    size = int(file.starts[-1])
    held = size * share.numerator // share.denominator
    inside = file.starts[1:-1]
    if 0 < held < size and len(inside):
        border = int(inside[np.argmin(np.abs(inside - (size - held)))])
        if held <= 2 * (size - border) and size - border <= 2 * held:
            held = size - border
    return np.clip(size - held - file.starts[:-1], 0, np.diff(file.starts))


def token_file(path: Path, found: os.stat_result, index: TokenIndex, *, vocab_size: int,
               checked: bool) -> TokenFile:
    """Open a file by its index.

    Args:
        path: the file.
        found: its current stat result.
        index: its index.
        vocab_size: ids of the vocabulary.
        checked: whether the index was made just now, so that no block must be compared with its checksum.
    """
    layout = Layout(index.start, index.tokens, index.dtype, index.checksums, BLOCK, vocab_size)
    blocks = TokenBlocks(path, layout, index.starts, found, errors=FileErrors(), links=True, checked=checked)
    parts = [index.dtype.newbyteorder("<").name, index.checksums, zlib.crc32(index.starts)]
    return TokenFile(blocks, index, hashlib.sha256(json.dumps(parts).encode()).hexdigest())


def warn_of_equal_files(files: Iterable[TokenFile]) -> None:
    """Warn of files that hold the same tokens."""
    known: dict[str, TokenFile] = {}
    for file in files:
        first = known.setdefault(file.content, file)
        if first is not file:
            log.warning("%s holds the same tokens as %s: they are trained on twice", file.tokens.path,
                        first.tokens.path)


def refuse_shared_files(trained: Iterable[TokenFile], heldout: Iterable[TokenFile]) -> None:
    """DataError if a file that is held out is also trained on."""
    known = {file.content: file for file in trained}
    for file in heldout:
        if file.content in known:
            raise DataError(166, "a held-out file is also trained on", where=str(file.tokens.path),
                            why=f"it holds what {known[file.content].tokens.path} holds, token by token",
                            next="data.path=<without that file>, or data.held_out=<another file>")
