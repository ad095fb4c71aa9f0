"""Token files that another program wrote, as training data: the streams of data=memmap and data=megatron.

    TokenFile      a file, by what was found when it was read once (data/tokens/index.py)
    Member         a file in a domain, and how much of each of its documents is trained on; the rest is held out
    TokenFiles     what data.token_dataset.TokenDataset reads in place of a prepared folder

Files are read with `pread` by data/tokens/blocks.py, never mapped into memory: one that is cut short while it is in use is an
error here and SIGBUS there. The fingerprint is made of their checksums.
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

SHARE = Fraction(1, 20)             # held out; fingerprints name another one alone


class TokenFile(NamedTuple):
    """A file of tokens. content: a hash of what it holds."""

    tokens: TokenBlocks
    index: TokenIndex
    content: str

    @property
    def starts(self) -> np.ndarray:
        """int64 [documents + 1], first token of every document, and the end."""
        return self.index.starts


class Member(NamedTuple):
    """A file of a domain. trained: int64 [documents], tokens of each document that are trained on, its first."""

    domain: int
    file: TokenFile
    trained: np.ndarray


@dataclass(frozen=True)
class TokenFiles:
    """Takes the place of data.prepared.Prepared.

    tokenizer: None where nobody knows what the ids stand for. end_id: what closes a document, as far as that is known.
    shares: of the samples, by domain, where the data says so itself. members: what the streams are made of.
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
    """Tokens [first, first + length) of files, in order; each is a document, or what is left of it."""

    domain: np.ndarray
    file: np.ndarray
    first: np.ndarray
    length: np.ndarray


class FileStream:
    """Spans of several files as one address space; takes the place of data.prepared.TokenStream.

    Args:
        files: by the number that `spans` have.
        spans: sorted by domain.
        num_domains: of all, also those without a span here.
        tokenizer: what the ids stand for.
    """

    def __init__(self, files: Sequence[TokenBlocks], spans: Spans, *, num_domains: int,
                 tokenizer: Tokenizer | None) -> None:
        self._files, self._tokenizer = files, tokenizer
        starts = np.concatenate([[0], np.cumsum(spans.length, dtype=np.int64)])
        self.size, self.document_starts = int(starts[-1]), starts[:-1]
        self.domain_bounds = starts[np.searchsorted(spans.domain, np.arange(num_domains + 1))]
        joined = (np.diff(spans.file) == 0) & (spans.first[1:] == (spans.first + spans.length)[:-1])
        begins = np.flatnonzero(np.concatenate([[True], ~joined])) if len(spans.file) else np.zeros(0,
                                                                                                    np.int64)
        self._run_file, self._run_first, self._run_start = spans.file[begins], spans.first[begins], starts[:-1][begins]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start to start + length as they lie in the files."""
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
        return int(self.domain_bounds[domain]), int(self.domain_bounds[domain + 1])

    def text_bytes(self, start: int, length: int) -> int | None:
        """Bytes of text that these tokens stand for, which only tokens that are bytes tell."""
        if self._tokenizer is None or self._tokenizer.identity != "bytes":
            return None
        ids = self.read(start, length)
        return int(((ids < 256) & (ids != self._tokenizer.end_id)).sum())


def open_files(path: Path, kind: str, members: Sequence[Member], domains: Sequence[str], *, vocab_size: int,
               tokenizer: Tokenizer | None, end_id: int | None, settings: Sequence[object],
               shares: Mapping[str, float] | None = None) -> TokenFiles:
    """The streams of some files.

    Args:
        path: to name in errors.
        kind: format of the fingerprint.
        members: files, sorted by domain.
        domains: names, by number.
        vocab_size: tokens of the vocabulary.
        tokenizer: what the ids stand for.
        end_id: id that closes a document.
        settings: what else decides which token is trained on, for the fingerprint.
        shares: of the samples, by domain.
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
    """Spans of what is trained on, and of what is held out."""
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
    """`trained` of a Member whose end is held out, from a border between two documents on if one lies near enough."""
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
    """A file by its index.

    Args:
        path: its name.
        found: the file as it lies there.
        index: what is known of it.
        vocab_size: ids that there are.
        checked: whether the index was made just now, so that no block has to be compared with its checksum.
    """
    layout = Layout(index.start, index.tokens, index.dtype, index.checksums, BLOCK, vocab_size)
    blocks = TokenBlocks(path, layout, index.starts, found, errors=FileErrors(), links=True, checked=checked)
    parts = [index.dtype.newbyteorder("<").name, index.checksums, zlib.crc32(index.starts)]
    return TokenFile(blocks, index, hashlib.sha256(json.dumps(parts).encode()).hexdigest())


def say_twice(files: Iterable[TokenFile]) -> None:
    """Warn of files that hold the same tokens."""
    known: dict[str, TokenFile] = {}
    for file in files:
        first = known.setdefault(file.content, file)
        if first is not file:
            log.warning("%s holds the same tokens as %s: they are trained on twice", file.tokens.path,
                        first.tokens.path)


def refuse_leak(trained: Iterable[TokenFile], heldout: Iterable[TokenFile]) -> None:
    """DataError where a file that is held out is one that is trained on."""
    known = {file.content: file for file in trained}
    for file in heldout:
        if file.content in known:
            raise DataError(166, "a held-out file is also trained on", where=str(file.tokens.path),
                            why=f"it holds what {known[file.content].tokens.path} holds, token by token",
                            next="data.path=<without that file>, or data.held_out=<another file>")
