"""data=megatron: Megatron-Core's indexed datasets (<prefix>.bin, <prefix>.idx) as training data.

    open_indexed(path, tokenizer, vocab_size) -> what data.token_dataset.TokenDataset reads in place of a prepared folder

A dataset is a domain; in a folder of several, each is one, by the name of its files. Documents lie end to end as the
preprocessing wrote them: an end-of-document id is where it put one, none is added. Files are opened and read by Megatron's
own `IndexedDataset`; windows, order and sample ids are those of data=tokens.

Held out is a share of the documents of each domain (one in 20), chosen by a permutation keyed by the domain's content;
where a domain has too few documents for that, each of them gives up that share of its tokens, the last. Duplicates are not
looked for.

Every token is read once when the data is opened: the fingerprint is made of checksums, and no id may lie outside the
vocabulary. A file that has changed since is refused: Megatron maps its files into memory, where one that was cut short is
SIGBUS.
"""

import hashlib
import json
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrain.data.permutation import permutation
from moetrain.data.split import exact
from moetrain.data.tokenizer import Tokenizer, load_tokenizer
from moetrain.errors import DataError
from moetrain.files import open_regular, reason
from moetrain.interop.packages import require

_SHARE = Fraction(1, 20)             # held out; fingerprints name another one alone
_FORMAT = "moetrain-megatron-1"
_BLOCK = 1 << 22                     # tokens read at once by the first pass
_SUFFIXES = (".bin", ".idx")
_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")   # magic, version, type of tokens, sequences, bounds of documents


class Domain(NamedTuple):
    """One indexed dataset. documents: number of its first sequence by document, and the number of sequences at the end."""

    name: str
    prefix: Path
    dataset: Any                     # megatron.core.datasets.indexed_dataset.IndexedDataset
    lengths: np.ndarray              # int64 tokens by sequence
    documents: np.ndarray            # int64
    content: str                     # hash of everything it holds
    state: tuple[tuple[int, int], ...]   # of its files when they were read

    def check(self) -> None:
        """DataError once a file is not the one that was read."""
        if self.state != (found := _state(self.prefix)):
            changed = self.state[0] == found[0]
            raise DataError(122, "an indexed dataset was changed while it was in use", where=f"{self.prefix}{_SUFFIXES[changed]}",
                            why="its size or time of change is not what it was when the data was opened",
                            next="restore the file; the same command goes on from the last save")


def _state(prefix: Path) -> tuple[tuple[int, int], ...]:
    """(size, time of change) of both files; (-1, 0) of one that is gone."""
    found = []
    for suffix in _SUFFIXES:
        try:
            status = os.stat(f"{prefix}{suffix}")
            found.append((status.st_size, status.st_mtime_ns))
        except OSError:
            found.append((-1, 0))
    return tuple(found)


class Spans(NamedTuple):
    """Tokens [first, first + length) of sequences, in order; document: number of the document in its domain."""

    domain: np.ndarray
    sequence: np.ndarray
    first: np.ndarray
    length: np.ndarray
    document: np.ndarray


@dataclass(frozen=True)
class Indexed:
    """Takes the place of data.prepared.Prepared. tokenizer: None where nobody knows what the ids stand for."""

    folder: Path
    fingerprint: str
    vocab_size: int
    domains: tuple[str, ...]
    tokenizer: Tokenizer | None
    train: "DocumentStream"
    heldout: "DocumentStream"


class DocumentStream:
    """Spans of several datasets as one address space; takes the place of data.prepared.TokenStream."""

    def __init__(self, domains: list[Domain], spans: Spans) -> None:
        self._domains, self._spans = domains, spans
        self._starts = np.concatenate([[0], np.cumsum(spans.length)])
        self.size = int(self._starts[-1])
        new = np.diff(spans.document, prepend=-1) | np.diff(spans.domain, prepend=-1)
        self.document_starts = self._starts[:-1][new != 0]
        self.domain_bounds = self._starts[np.searchsorted(spans.domain, np.arange(len(domains) + 1))]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start to start + length as they lie in the files."""
        assert 0 <= start <= start + length <= self.size, (start, length, self.size)
        pieces = [np.zeros(0, np.uint8)]
        number = int(np.searchsorted(self._starts, start, "right")) - 1
        while length > 0:
            inside = start - int(self._starts[number])
            count = min(length, int(self._spans.length[number]) - inside)
            domain = self._domains[self._spans.domain[number]]
            domain.check()
            first = int(self._spans.first[number]) + inside
            pieces.append(domain.dataset.get(int(self._spans.sequence[number]), offset=first, length=count))
            start, length, number = start + count, length - count, number + 1
        return pieces[-1] if len(pieces) == 2 else np.concatenate(pieces)

    def domain_range(self, domain: int) -> tuple[int, int]:
        return int(self.domain_bounds[domain]), int(self.domain_bounds[domain + 1])


def open_indexed(*, path: str, tokenizer: str, vocab_size: int, held_out_share: float = float(_SHARE)) -> Indexed:
    """Open indexed datasets.

    Args:
        path: a prefix, or a folder of several.
        tokenizer: none, bytes or the path of a tokenizer.json, which brings its own vocabulary.
        vocab_size: the vocabulary where the tokenizer is none.
        held_out_share: of the documents of a domain.
    """
    require("megatron.core", extra="megatron", key="data=megatron")
    encoder = None if tokenizer == "none" else load_tokenizer(tokenizer)
    vocabulary = encoder.vocab_size if encoder else vocab_size
    domains = [_open_domain(prefix, vocabulary) for prefix in _prefixes(Path(path))]
    share = exact(held_out_share)
    train, heldout = zip(*(_split(number, domain, share) for number, domain in enumerate(domains)))
    streams = [DocumentStream(domains, Spans(*map(np.concatenate, zip(*spans)))) for spans in (train, heldout)]
    if not streams[1].size:
        raise DataError(74, "there is too little data to hold some out", where=path,
                        why=f"{streams[0].size:,} tokens, and no document has {-(-1 // share)}",
                        next="data.path=<prefix of a larger dataset>")
    described = [_FORMAT, encoder.identity if encoder else "none", [(domain.name, domain.content) for domain in domains],
                 *([] if share == _SHARE else [f"held out {share}"])]
    fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    return Indexed(Path(path), fingerprint, vocabulary, tuple(domain.name for domain in domains), encoder, *streams)


def _prefixes(path: Path) -> list[Path]:
    """The datasets below a path, by name."""
    if path.is_dir():
        found = sorted({file.with_suffix("") for suffix in ("*.idx", "*.bin") for file in path.glob(suffix)})
    else:
        found = [path.with_suffix("") if path.suffix in (".idx", ".bin") else path]
    for prefix in found or [path / "<name>"]:
        for suffix in _SUFFIXES:
            file = Path(f"{prefix}{suffix}")
            if not file.is_file():
                raise DataError(70, "there is no indexed dataset", where=f"{path} (data.path)", why=f"{file} is not there",
                                next="data.path=<prefix of a .bin and .idx, without the ending, or a folder of them>")
    return found


def _open_domain(prefix: Path, vocab_size: int) -> Domain:
    state = _state(prefix)
    dataset = _read_index(prefix)
    lengths = np.asarray(dataset.index.sequence_lengths, np.int64)
    documents = np.asarray(dataset.index.document_indices, np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    width = np.dtype(dataset.index.dtype).itemsize
    if np.dtype(dataset.index.dtype).kind not in "iu":
        raise _damaged(prefix, f"its tokens are {np.dtype(dataset.index.dtype)}, not integers")
    if (lengths < 0).any() or (np.asarray(dataset.index.sequence_pointers) != starts[:-1] * width).any():
        raise _damaged(prefix, "its sequences do not lie end to end")
    if documents[0] != 0 or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
        raise _damaged(prefix, "its documents do not cover the sequences")
    content = _check_tokens(prefix, dataset, starts, documents, vocab_size)
    return Domain(prefix.name, prefix, dataset, lengths, documents, content, state)


def _read_index(prefix: Path) -> Any:
    _check_header(prefix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")              # that other accelerators' packages are not installed
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    try:
        return IndexedDataset(str(prefix), multimodal=False, mmap=True)
    except (AssertionError, ValueError, OSError) as error:
        raise _damaged(prefix, f"Megatron's reader refuses it: {type(error).__name__} {error}".rstrip()) from error


def _check_header(prefix: Path) -> None:
    """The counts against the files, before anything is mapped: a reader that fails half-way leaves an object behind whose
    removal raises, at any later time."""
    index = Path(f"{prefix}.idx")
    try:
        with open_regular(index) as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise _damaged(prefix, reason(error)) from error
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise _damaged(prefix, f"it starts with {head[:9]!r}, not with {_MAGIC!r} and a header")
    _, version, code, sequences, documents = _HEADER.unpack(head)
    if version != 1 or code not in range(1, 9) or not documents:
        raise _damaged(prefix, f"version {version}, type of tokens {code}, {documents} bounds of documents")
    size, expected = index.stat().st_size, _HEADER.size + 12 * sequences + 8 * documents
    if size != expected:
        kind = "; a multimodal dataset has that length" if size == expected + sequences else ""
        raise _damaged(prefix, f"{size:,} bytes instead of {expected:,} for {sequences:,} sequences{kind}")
    if not Path(f"{prefix}.bin").stat().st_size:
        raise _wrong_length(prefix, "it is empty")


def _damaged(prefix: Path, why: str) -> DataError:
    return DataError(71, "an indexed dataset cannot be read", where=f"{prefix}.idx", why=why,
                     next="preprocess the text again, or restore the file from a copy")


def _wrong_length(prefix: Path, why: str) -> DataError:
    return DataError(72, "a dataset is not as long as its index says", where=f"{prefix}.bin", why=why,
                     next="copy both files again, or preprocess the text again")


def _check_tokens(prefix: Path, dataset: Any, starts: np.ndarray, documents: np.ndarray, vocab_size: int) -> str:
    """One pass over the tokens: their hash, index included; DataError where one is outside the vocabulary."""
    file, dtype = Path(f"{prefix}.bin"), np.dtype(dataset.index.dtype)
    total, checksums = int(starts[-1]), []
    with open_regular(file) as opened:
        size, expected = os.fstat(opened.fileno()).st_size, total * dtype.itemsize
        if size != expected:
            raise _wrong_length(prefix, f"{size:,} bytes instead of {expected:,}")
        for begin in range(0, total, _BLOCK):
            length = min(_BLOCK, total - begin)
            content = opened.read(length * dtype.itemsize)
            if len(content) < length * dtype.itemsize:
                raise _wrong_length(prefix, "it was cut short while it was read")
            block = np.frombuffer(content, dtype)
            checksums.append(zlib.crc32(block))
            if block.max() >= vocab_size or block.min() < 0:
                place = int(np.argmax((block >= vocab_size) | (block < 0)))
                raise DataError(73, "a token id is outside the vocabulary", where=f"{file}, token {begin + place:,}",
                                why=f"id {int(block[place])} with a vocabulary of {vocab_size:,}",
                                next="data.tokenizer=<the tokenizer.json that made the ids>, or data.tokenizer=none with a "
                                     "larger data.vocab_size")
    parts = [dtype.name, checksums, zlib.crc32(starts), zlib.crc32(documents)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _split(number: int, domain: Domain, share: Fraction) -> tuple[Spans, Spans]:
    """(training, held-out) spans of a domain. Document d is trained on up to its token cut[d] and held out from there."""
    starts = np.concatenate([[0], np.cumsum(domain.lengths)])
    begins, sizes = starts[domain.documents[:-1]], np.diff(starts[domain.documents])
    count = len(sizes)
    if count * share < 1:
        cut = sizes - sizes * share.numerator // share.denominator
    else:
        cut = sizes.copy()
        cut[permutation(("megatron", domain.content), count)[:int(count * share)]] = 0
    document = np.repeat(np.arange(count), np.diff(domain.documents))
    trained = np.clip(cut[document] - (starts[:-1] - begins[document]), 0, domain.lengths)
    every = Spans(np.full(len(document), number), np.arange(len(document)), np.zeros_like(trained), trained, document)
    rest = every._replace(first=trained, length=domain.lengths - trained)
    return _without_empty(every), _without_empty(rest)


def _without_empty(spans: Spans) -> Spans:
    return Spans(*(column[spans.length > 0] for column in spans))
