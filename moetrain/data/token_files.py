"""Token files that another program wrote, as training data: the streams of data=memmap and data=megatron.

    TokenFile      a file that was read once: its tokens, where its documents begin, a hash of what it holds
    Member         a file in a domain, and how much of each of its documents is trained on; the rest is held out
    TokenFiles     what data.token_dataset.TokenDataset reads in place of a prepared folder

Files are read with `pread` by token_blocks.py, never mapped into memory: one that is cut short while it is in use is an
error here and SIGBUS there. They are read once when the data is opened: the fingerprint is made of their checksums, and no
id may lie outside the vocabulary.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from moetrain.data.token_blocks import Layout, TokenBlocks
from moetrain.data.tokenizer import Tokenizer
from moetrain.data.tokens import BLOCK
from moetrain.errors import DataError
from moetrain.files import reason

log = logging.getLogger(__name__)

SHARE = Fraction(1, 20)             # held out; fingerprints name another one alone


class FileErrors:
    """A file is as it was when the data was opened, or it is refused."""

    def unreadable(self, path: Path, error: OSError) -> DataError:
        return self._changed(path, reason(error))

    def altered(self, path: Path, offset: int, why: str) -> DataError:
        return self._changed(path, f"from byte {offset:,} on: {why}")

    def truncated(self, path: Path, size: int, expected: int) -> DataError:
        return self._changed(path, f"{size:,} bytes instead of {expected:,}")

    def outside(self, path: Path, place: str, id: int, vocab_size: int, advice: str = "") -> DataError:
        return DataError(73, "a token id is outside the vocabulary", where=f"{path}, {place}",
                         why=f"id {id} with a vocabulary of {vocab_size:,}",
                         next="data.tokenizer=<the tokenizer.json that made the ids>, or data.tokenizer=none with a larger "
                              f"data.vocab_size{advice}")

    def _changed(self, path: Path, why: str) -> DataError:
        return DataError(122, "a token file was changed while it was in use", where=str(path), why=why,
                         next="restore the file; the same command goes on from the last save")


class TokenFile(NamedTuple):
    """A file of tokens. starts: int64 [documents + 1], first token of every document, and the end."""

    tokens: TokenBlocks
    starts: np.ndarray
    content: str


class Member(NamedTuple):
    """A file of a domain. trained: int64 [documents], tokens of each document that are trained on, its first."""

    domain: int
    file: TokenFile
    trained: np.ndarray


@dataclass(frozen=True)
class TokenFiles:
    """Takes the place of data.prepared.Prepared.

    tokenizer: None where nobody knows what the ids stand for. end_id: what closes a document, as far as that is known.
    shares: of the samples, by domain, where the data says so itself.
    """

    folder: Path
    fingerprint: str
    vocab_size: int
    domains: tuple[str, ...]
    tokenizer: Tokenizer | None
    end_id: int | None
    train: "FileStream"
    heldout: "FileStream"
    shares: Mapping[str, float] | None = None


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

    def __init__(self, files: Sequence[TokenBlocks], spans: Spans, *, num_domains: int, tokenizer: Tokenizer | None) -> None:
        self._files, self._tokenizer = files, tokenizer
        starts = np.concatenate([[0], np.cumsum(spans.length, dtype=np.int64)])
        self.size, self.document_starts = int(starts[-1]), starts[:-1]
        self.domain_bounds = starts[np.searchsorted(spans.domain, np.arange(num_domains + 1))]
        joined = (np.diff(spans.file) == 0) & (spans.first[1:] == (spans.first + spans.length)[:-1])
        begins = np.flatnonzero(np.concatenate([[True], ~joined])) if len(spans.file) else np.zeros(0, np.int64)
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
                 [(domains[member.domain], member.file.content, zlib.crc32(member.trained)) for member in members], *settings]
    fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    return TokenFiles(path, fingerprint, vocab_size, tuple(domains), tokenizer, end_id, train, heldout, shares)


def _sides(members: Sequence[Member]) -> Iterator[Spans]:
    """Spans of what is trained on, and of what is held out."""
    for held in (False, True):
        columns: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in Spans._fields]
        for number, (domain, file, trained) in enumerate(members):
            sizes = np.diff(file.starts)
            assert len(trained) == len(sizes) and ((trained >= 0) & (trained <= sizes)).all(), (number, len(sizes))
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


def read_once(file: BinaryIO, path: Path, *, start: int, tokens: int, dtype: np.dtype, vocab_size: int,
              visit: Callable[[int, np.ndarray], None] | None = None, advice: str = "") -> list[int]:
    """Checksums of the blocks of a file; DataError where an id is outside the vocabulary.

    Args:
        file: open for reading.
        path: its name.
        start: first byte of the tokens.
        tokens: how many there are; the file was seen to have them.
        dtype: of an id.
        vocab_size: ids that there are.
        visit: called with every block and the number of its first token.
        advice: what else may help against an id outside the vocabulary.
    """
    checksums = []
    for begin in range(0, tokens, BLOCK):
        length = min(BLOCK, tokens - begin) * dtype.itemsize
        content = os.pread(file.fileno(), length, start + begin * dtype.itemsize)
        if len(content) < length:
            raise FileErrors().truncated(path, os.fstat(file.fileno()).st_size, start + tokens * dtype.itemsize)
        block = np.frombuffer(content, dtype)
        checksums.append(zlib.crc32(block))
        if int(block.max()) >= vocab_size or int(block.min()) < 0:
            place = int(np.argmax((block >= vocab_size) | (block < 0)))
            raise FileErrors().outside(path, f"token {begin + place:,}", int(block[place]), vocab_size, advice)
        if visit:
            visit(begin, block)
    return checksums


def token_file(path: Path, found: os.stat_result, *, start: int, tokens: int, dtype: np.dtype, checksums: list[int],
               vocab_size: int, starts: np.ndarray) -> TokenFile:
    """What `read_once` has read."""
    layout = Layout(start, tokens, dtype, checksums, BLOCK, vocab_size)
    blocks = TokenBlocks(path, layout, starts, found, errors=FileErrors(), links=True, checked=True)
    parts = [dtype.newbyteorder("<").name, checksums, zlib.crc32(starts)]
    return TokenFile(blocks, starts, hashlib.sha256(json.dumps(parts).encode()).hexdigest())


def say_twice(files: Iterable[TokenFile]) -> None:
    """Warn of files that hold the same tokens."""
    known: dict[str, TokenFile] = {}
    for file in files:
        first = known.setdefault(file.content, file)
        if first is not file:
            log.warning("%s holds the same tokens as %s: they are trained on twice", file.tokens.path, first.tokens.path)


def refuse_leak(trained: Iterable[TokenFile], heldout: Iterable[TokenFile]) -> None:
    """DataError where a file that is held out is one that is trained on."""
    known = {file.content: file for file in trained}
    for file in heldout:
        if file.content in known:
            raise DataError(166, "a held-out file is also trained on", where=str(file.tokens.path),
                            why=f"it holds what {known[file.content].tokens.path} holds, token by token",
                            next="data.path=<without that file>, or data.held_out=<another file>")
